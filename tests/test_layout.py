"""Any NumPy array is valid, wherever and however it lies: strides, alignment, byte order, broadcasting, out=."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bounds import check
from numpy.typing import NDArray
from reference import Problem

import gqa_ext

Array = NDArray[Any]
NAMES = ("query", "key", "value", "attn_mask")


# Each gives an array equal to x that lies differently in memory.


def transposed(x: Array) -> Array:
    """(B, S, H, D) in memory, as projections leave it."""
    return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)


def fortran(x: Array) -> Array:
    return np.asfortranarray(x)


def backwards(x: Array) -> Array:
    """Negative strides in every dimension."""
    return np.ascontiguousarray(np.flip(x))[tuple(slice(None, None, -1) for _ in x.shape)]


def sparse(x: Array) -> Array:
    """Every third element of every other row."""
    wide = np.full((*x.shape[:-2], x.shape[-2] * 2, x.shape[-1] * 3), 7, x.dtype)
    wide[..., ::2, ::3] = x
    return wide[..., ::2, ::3]


def padded(x: Array) -> Array:
    """Rows apart, elements side by side, the start off by one element."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), 7, x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def unaligned(x: Array) -> Array:
    """One byte past any boundary."""
    raw = np.empty(x.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape)


def record(x: Array) -> Array:
    """A field of packed records: unaligned, and strides that are no multiple of the element."""
    records = np.zeros(x.shape, [("tag", np.uint8), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


def swapped(x: Array) -> Array:
    """The other byte order."""
    return x.astype(x.dtype.newbyteorder())


def swapped_record(x: Array) -> Array:
    return record(swapped(x))


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: list[Callable[[Array], Array]] = [
    transposed, fortran, backwards, sparse, padded, unaligned, record, swapped, swapped_record, read_only
]  # fmt: skip


def arrays(dtype: str, seq_q: int, seq_k: int, *, mask: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng([seq_q, seq_k])
    shapes = ((2, 4, seq_q, 21), (2, 2, seq_k, 21), (2, 2, seq_k, 10), (2, 4, seq_q, seq_k))
    made = {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    keep = made["attn_mask"] < 0.7
    made["attn_mask"] = keep if mask == "bool" else np.where(keep, made["attn_mask"], -np.inf).astype(mask)
    return made


def agree(given: dict[str, Array], isa: str, label: str, **more: Any) -> Array:
    """The call is right, and leaves its inputs alone."""
    before = {name: x.copy() for name, x in given.items()}
    out, lse = gqa_ext.scaled_dot_product_attention(**given, return_lse=True, **more)
    for name, x in given.items():
        assert np.array_equal(x, before[name]), f"{label}: {name} was written"
    check(out, Problem(**before), lse=lse, isa=isa, label=label)
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout: Callable[[Array], Array], dtype: str, isa: str) -> None:
    for seq_q, seq_k in ((1, 3), (3, 140), (50, 37), (20, 530)):
        given = arrays(dtype, seq_q, seq_k)
        for name in NAMES:
            agree({**given, name: layout(given[name])}, isa, f"{layout.__name__} {name} {seq_q}x{seq_k}")
        agree({name: layout(x) for name, x in given.items()}, isa, f"all {layout.__name__} {seq_q}x{seq_k}")


@pytest.mark.parametrize("mask", ["bool", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_other_masks(layout: Callable[[Array], Array], mask: str, isa: str) -> None:
    given = arrays("float32", 50, 140, mask=mask)
    agree({**given, "attn_mask": layout(given["attn_mask"])}, isa, f"{layout.__name__} {mask}")


@pytest.mark.parametrize("axis", range(4))
def test_zero_strides(axis: int, isa: str) -> None:
    """Dimensions repeated by broadcast_to, for each operand and all of them."""
    for seq_q in (2, 50):
        given = arrays("float32", seq_q, 140)
        repeated = {name: np.broadcast_to(np.take(x, [0], axis).clip(-9, 9), x.shape) for name, x in given.items()}
        for name in NAMES:
            agree({**given, name: repeated[name]}, isa, f"axis {axis} of {name}")
        agree(repeated, isa, f"axis {axis} of all")


SHAPES = [  # query, key, value
    ((5, 8), (6, 8), (6, 3)),
    ((2, 5, 8), (2, 6, 8), (2, 6, 3)),
    ((2, 5, 8), (6, 8), (6, 3)),
    ((3, 4, 5, 8), (2, 6, 8), (3, 2, 6, 3)),
    ((4, 5, 8), (3, 2, 6, 8), (2, 6, 3)),
    ((1, 4, 5, 8), (3, 2, 6, 8), (1, 2, 6, 3)),
    ((2, 1, 4, 5, 8), (3, 2, 6, 8), (1, 3, 2, 6, 3)),
    ((2, 3, 1, 4, 5, 8), (3, 1, 2, 6, 8), (5, 2, 6, 3)),
    ((0, 4, 5, 8), (0, 2, 6, 8), (0, 2, 6, 3)),
    ((0, 4, 5, 8), (1, 2, 6, 8), (2, 6, 3)),
    ((3, 0, 5, 8), (3, 0, 6, 8), (3, 0, 6, 3)),
    ((3, 4, 0, 8), (3, 2, 6, 8), (3, 2, 6, 3)),
    ((3, 4, 5, 8), (3, 2, 0, 8), (3, 2, 0, 3)),
    ((3, 4, 5, 8), (3, 2, 6, 8), (3, 2, 6, 0)),
    ((3, 4, 1, 8), (3, 2, 6, 8), (3, 2, 6, 0)),
    ((1,) * 8 + (2, 4, 5, 8), (2, 2, 6, 8), (2, 6, 3)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_leading_dimensions_broadcast(shapes: tuple[tuple[int, ...], ...], dtype: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip(NAMES, shapes, strict=False)}
    agree(given, isa, str(shapes))


def test_array_likes() -> None:
    """Nested lists are float64, as NumPy reads them."""
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((1, 4, 3)) for name in NAMES[:3]}
    out = gqa_ext.scaled_dot_product_attention(*(x.tolist() for x in given.values()))
    check(out, Problem(**given))
    assert type(out) is np.ndarray
    assert out.flags.c_contiguous
    assert out.flags.owndata or out.base is not None


def test_new_arrays_are_contiguous_and_native() -> None:
    given = arrays("float32", 4, 9)
    strange = {name: swapped(backwards(x)) for name, x in given.items()}
    out, lse = gqa_ext.scaled_dot_product_attention(**strange, return_lse=True)
    for x in (out, lse):
        assert x.flags.c_contiguous
        assert x.dtype.isnative


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if "swapped" not in x.__name__ and x is not read_only],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_out_of_every_layout(layout: Callable[[Array], Array], dtype: str, isa: str) -> None:
    for seq_q in (1, 50):
        given = arrays(dtype, seq_q, 140)
        out = layout(np.full((2, 4, seq_q, 10), 3, dtype))
        surroundings = out.base.copy() if out.base is not None else None
        assert agree(given, isa, layout.__name__, out=out) is out
        if surroundings is not None and out.base is not None:
            out_now = out.copy()
            out[...] = 3  # what lies between the elements must be as it was
            assert np.array_equal(out.base, surroundings)
            out[...] = out_now


def overlapping() -> dict[str, Callable[[Array], tuple[Array, Array]]]:
    """Ways for out to share memory with one input of the same size: (input, out) made of its values."""

    def shifted(x: Array) -> tuple[Array, Array]:
        memory = np.zeros(x.size + 5, x.dtype)
        memory[: x.size] = x.ravel()
        return memory[: x.size].reshape(x.shape), memory[5:].reshape(x.shape)

    return {
        "same": lambda x: (x, x),
        "another view of the same": lambda x: (x, x[...]),
        "reversed": lambda x: (x, x[..., ::-1, :]),
        "shifted": shifted,
    }


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("way", overlapping())
@pytest.mark.parametrize("seq", [1, 5, 150])
def test_out_may_overlap_an_input(name: str, way: str, seq: int, isa: str) -> None:
    rng = np.random.default_rng(seq)
    given = {x: rng.standard_normal((2, 3, seq, 16), dtype=np.float32) for x in NAMES[:3]}
    problem = Problem(**{x: array.copy() for x, array in given.items()})
    given[name], out = overlapping()[way](given[name])
    assert gqa_ext.scaled_dot_product_attention(**given, out=out) is out
    check(out, problem, isa=isa, label=f"{name} {way}")


def test_out_may_overlap_a_mask(isa: str) -> None:
    rng = np.random.default_rng(0)
    query, key, value, mask = (rng.standard_normal((1, 2, 40, 40), dtype=np.float32) for _ in range(4))
    problem = Problem(query, key, value, mask.copy())
    check(gqa_ext.scaled_dot_product_attention(query, key, value, mask, out=mask), problem, isa=isa)


def test_query_key_and_value_may_be_one_array(isa: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 60, 16), dtype=np.float32)
    problem = Problem(x.copy(), x.copy(), x.copy())
    check(gqa_ext.scaled_dot_product_attention(x, x, x, out=x), problem, isa=isa)


def test_out_that_cannot_be_written() -> None:
    given = arrays("float32", 4, 9)
    fine = np.zeros((2, 4, 4, 10), np.float32)
    self_overlapping = np.lib.stride_tricks.as_strided(fine, strides=(*fine.strides[:-2], 4, 4))
    bad = [
        read_only(fine),
        self_overlapping,
        np.broadcast_to(fine[:1], fine.shape),
        fine[:1],
        fine[..., :-1],
        fine[None],
    ]
    for out in bad:
        with pytest.raises(ValueError, match=r"scaled_dot_product_attention\(\): out"):
            gqa_ext.scaled_dot_product_attention(**given, out=out)
    for wrong in (fine.astype(np.float64), fine.astype(np.int32)):
        with pytest.raises(TypeError, match=r"scaled_dot_product_attention\(\): out"):
            gqa_ext.scaled_dot_product_attention(**given, out=wrong)
