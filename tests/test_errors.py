"""Every bad argument raises the right exception, and its message helps.

A message has five parts: the call, the argument, what came, what was wanted, the fix.  Each row of a
table gives the text that must follow the name of the call; the fix stands behind the last colon.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gqa_ext
from gqa_ext import kv_cache_nbytes, repeat_kv, scaled_dot_product_attention, set_num_threads, testing
from gqa_ext._rules import NO_RULES

pytestmark = pytest.mark.quick

QUERY = np.ones((2, 8, 5, 16), np.float32)
KEY = np.ones((2, 2, 7, 16), np.float32)
VALUE = np.ones((2, 2, 7, 9), np.float32)
OUT = np.empty((2, 8, 5, 9), np.float32)


def refusal(error: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    """The message after "call(): "; the inputs must come out of it unharmed."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    head, _, message = str(caught.value).partition("(): ")
    assert head == call.__name__
    return message


def attend(**changes: Any) -> Any:
    """A good call but for the changes."""
    return scaled_dot_product_attention(**{"query": QUERY, "key": KEY, "value": VALUE, **changes})


attend.__name__ = "scaled_dot_product_attention"


def read_only() -> np.ndarray:
    array = OUT.copy()
    array.flags.writeable = False
    return array


SHAPES = [
    ({"query": QUERY[0, 0, 0]}, "query has 1 dimension; at least ", "pass query[None, :] for a single row"),
    ({"key": KEY[0, 0, 0]}, "key has 1 dimension; ", "pass key[None, :] for a single row"),
    ({"value": np.array(1.0, np.float32)}, "value has 0 dimensions; ", "pass an array of rows"),
    ({"query": QUERY[..., :8]}, "key has head_dim 16 but query has 8; ", "slice or project one of them"),
    ({"key": KEY.swapaxes(-1, -2)}, "key has head_dim 7 but query has 16; ", "pass key.swapaxes(-1, -2)"),
    (
        {"query": QUERY[..., :0], "key": KEY[..., :0]},
        "query and key have head_dim 0; at least 1 was wanted",
        "pass arrays with a last dimension",
    ),
    ({"value": VALUE[:, :, :3]}, "value has 3 rows but key has 7; ", "pass the same 3 positions of both"),
    ({"value": VALUE[:, :1]}, "value has 1 head but key has 2; ", "with equal heads"),
    ({"enable_gqa": False}, "key has 2 heads but query has 8 and enable_gqa is False; ", "pass enable_gqa=True"),
    (
        {"key": np.ones((3, 2, 7, 16), np.float32)},
        "query has batch dimensions (2,), key (3,) and value (2,); ",
        "give all three the same batch, or 1 where one is shared",
    ),
    ({"attn_mask": np.ones((2, 5, 7), bool)}, "attn_mask has shape (2, 5, 7); ", "pass attn_mask[:, None]"),
    ({"attn_mask": np.ones((2, 7), bool)}, "attn_mask has shape (2, 7); ", "pass attn_mask[:, None, None]"),
    (
        {"attn_mask": np.ones((7, 5), bool)},
        "attn_mask has shape (7, 5); ",
        "attn_mask.swapaxes(-1, -2), rows are queries",
    ),
    ({"attn_mask": np.ones((3, 2, 8, 5, 7), bool)}, "attn_mask has shape (3, 2, 8, 5, 7); ", "or with 1 in any place"),
    ({"attn_mask": np.ones((2, 8, 5, 8), bool)}, "it must broadcast to (..., query heads, ", "or with 1 in any place"),
    ({"attn_mask": np.ones((0, 7), bool)}, "(2, 8, 5, 7) and not widen it", "or with 1 in any place"),
    (
        {"out": OUT[..., :3]},
        "out has shape (2, 8, 5, 3); (2, 8, 5, 9) was wanted",
        "np.empty((2, 8, 5, 9), np.float32)",
    ),
    ({"out": QUERY.copy()}, "out has shape (2, 8, 5, 16); ", "np.empty((2, 8, 5, 9), np.float32)"),
    ({"out": read_only()}, "out is read-only; ", "pass np.empty(shape, dtype), or leave it out"),
    ({"scale": float("nan")}, "scale is nan; a finite number was wanted, ", "leave it out or pass a finite one"),
    ({"scale": -np.inf}, "scale is -inf; ", "leave it out or pass a finite one"),
    (
        {"scale": 1e39},
        "scale is 1e+39; 0 or a size from 1.18e-38 to 3.4e+38 was wanted, as scores are made in float32",
        "pass float64 arrays, or multiply query by it in float64, cast that back, and pass scale=1.0",
    ),
    ({"scale": -1e-39, "query": QUERY.astype(ml_dtypes.bfloat16)}, "scale is -1e-39; 0 or a size", "pass scale=1.0"),
    ({"scale": 5e-324}, "scale is 5e-324; 0 or a size", "pass scale=1.0"),
    ({"scale": 10**400}, f"scale is 1{36 * '0'}..., an int; a real ", "pass a float, or None for 1/sqrt(head_dim)"),
    ({"scale": 10**5000}, "scale is 0x", "pass a float, or None for 1/sqrt(head_dim)"),
    ({"dropout_p": 1.5}, "dropout_p is 1.5; a probability between 0 and 1 was wanted", "pass dropout_p=0.0"),
    ({"dropout_p": -0.1}, "dropout_p is -0.1; ", "pass dropout_p=0.0"),
    ({"dropout_p": float("nan")}, "dropout_p is nan; ", "pass dropout_p=0.0"),
    ({"causal_alignment": "bottom_right"}, "causal_alignment is 'bottom_right'; ", "else leave it out"),
    ({"causal_alignment": ["upper_left"]}, "causal_alignment is ['upper_left']; ", "else leave it out"),
    ({"causal_alignment": list(range(99))}, "causal_alignment is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11...; ", ""),
    ({"query": [[1.0, 2.0], [3.0]]}, "query is a list that is no array (", "make its rows equally long"),
]


@pytest.mark.parametrize(("changes", "came", "fix"), SHAPES)
def test_shapes_and_values(changes: dict[str, Any], came: str, fix: str) -> None:
    message = refusal(ValueError, attend, **changes)
    assert came in message
    assert message.endswith(fix) or fix in message.rpartition(": ")[2]


def test_the_house_example_to_the_letter() -> None:
    query, key = np.ones((2, 32, 128, 64), np.float32), np.ones((2, 6, 128, 64), np.float32)
    assert refusal(ValueError, scaled_dot_product_attention, query, key, key) == (
        "key has 6 heads but query has 32; query heads must be a multiple of key heads "
        "(query (2, 32, 128, 64), key (2, 6, 128, 64)): pass key and value with one of 1, 2, 4, 8, 16, 32 heads"
    )


def test_no_kv_heads_for_some_query_heads() -> None:
    message = refusal(ValueError, scaled_dot_product_attention, QUERY, KEY[:, :0], VALUE[:, :0])
    assert message.startswith("key has 0 heads but query has 8; ")


INPUT_TYPES = [
    (None, "None", "pass an array as {}"),
    ("text", "'text', a str", "pass an array as {}"),
    (True, "True", "pass an array as {}"),
    ({}, "a dict of Python objects", "pass np.asarray({}, np.float32)"),
    (object(), "an object of Python objects", "pass np.asarray({}, np.float32)"),
    (np.ma.ones((2, 8, 5, 16)), "a masked array", "pass {}.filled(...) and the masked slots in attn_mask"),
]
INPUT_DTYPES = ["int32", "int64", "uint8", "bool", "complex64", "complex128", "object", "longdouble", "M8[s]", "U3"]
INPUT_NAMES = ["query", "key", "value"]


@pytest.mark.parametrize("name", INPUT_NAMES)
@pytest.mark.parametrize(("thing", "came", "fix"), INPUT_TYPES)
def test_input_of_the_wrong_type(name: str, thing: Any, came: str, fix: str) -> None:
    message = refusal(TypeError, attend, **{name: thing})
    assert message.startswith(f"{name} is {came}; ")
    assert message.endswith(": " + fix.format(name))


@pytest.mark.parametrize("name", INPUT_NAMES)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_input_of_the_wrong_dtype(name: str, dtype: str) -> None:
    array = np.zeros((2, 2, 7, 16), dtype)
    message = refusal(TypeError, attend, **{name: array})
    assert message.startswith(f"{name} has dtype {array.dtype}; float16, bfloat16, float32 or float64 was wanted: ")
    if array.dtype.kind in "iub":
        assert message.endswith(f"pass {name}.astype(np.float32)")


@pytest.mark.parametrize("name", INPUT_NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float64_goes_only_with_float64(name: str, dtype: Any) -> None:
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    mixed = {other: array.astype(np.float64 if other == name else dtype) for other, array in arrays.items()}
    message = refusal(TypeError, attend, **mixed)
    assert f"{name} is float64" in message
    assert "; float64 goes only with float64: pass " in message
    assert message.endswith(".astype(np.float64), or all three as float32")


TYPES = [
    ({"attn_mask": True}, "attn_mask is True; an array was wanted: pass is_causal=True by its name"),
    ({"attn_mask": np.ones((5, 7), np.int64)}, "attn_mask.astype(bool), True where a key may be seen"),
    ({"attn_mask": np.ones((5, 7), np.uint8)}, "attn_mask has dtype uint8; bool, float16, bfloat16, "),
    ({"attn_mask": np.ones((5, 7), complex)}, "attn_mask has dtype complex128; "),
    ({"attn_mask": np.ma.ones((5, 7))}, ": pass attn_mask.filled(-np.inf), which masks those slots"),
    ({"attn_mask": np.ma.ones((5, 7), bool)}, "pass attn_mask.filled(False), which masks those slots"),
    ({"attn_mask": "causal"}, "attn_mask is 'causal', a str; an array of bools or floating-point numbers was wanted: "),
    (
        {"attn_mask": [[None]]},
        "of Python objects; an array of bools or floating-point numbers was wanted: "
        "pass np.asarray(attn_mask, bool), True where a key is seen, or np.float32, added to scores",
    ),
    ({"scale": "0.1"}, "scale is '0.1', a str; a real number was wanted: pass a float, or None"),
    ({"scale": True}, "scale is True; "),
    ({"scale": 1j}, "scale is 1j, a complex; "),
    ({"scale": np.array([0.5])}, "scale is a numpy.ndarray; "),
    ({"scale": np.complex64(0.5)}, "scale is a numpy.complex64; a real number was wanted: "),
    ({"scale": np.timedelta64(3)}, "scale is a numpy.timedelta64; "),
    ({"scale": np.array("0.5")}, "scale is a numpy.ndarray; "),
    ({"scale": np.True_}, "scale is np.True_; "),
    ({"dropout_p": None}, "dropout_p is None; a real number was wanted: pass dropout_p=0.0"),
    ({"dropout_p": True}, "dropout_p is True; a real number was wanted: pass dropout_p=0.0, and is_causal by its name"),
    (
        {"is_causal": 0.125},
        "is_causal is 0.125, a float; True or False was wanted: pass is_causal=True or False, and scale",
    ),
    ({"is_causal": None}, "is_causal is None; "),
    ({"enable_gqa": 1}, "enable_gqa is 1, an int; "),
    ({"return_lse": "yes"}, "return_lse is 'yes', a str; "),
    ({"return_weights": 0}, "return_weights is 0, an int; "),
    ({"rng": "seed"}, "rng is 'seed', a str; an int, a np.random.Generator or None was wanted: pass rng=0 or "),
    ({"rng": True, "dropout_p": 0.5}, "rng is True; "),
    ({"rng": np.random.RandomState(0), "dropout_p": 0.5}, "rng is a numpy.random."),
    ({"out": OUT.astype(np.float64)}, "out has dtype float64; query's dtype float32 was wanted: pass np.empty("),
    ({"out": OUT.tolist()}, "out is a list; an ndarray of the result's shape and dtype was wanted: "),
    ({"out": np.ma.array(OUT)}, "out is a numpy.ma"),
]


@pytest.mark.parametrize(("changes", "text"), TYPES)
def test_types(changes: dict[str, Any], text: str) -> None:
    assert text in refusal(TypeError, attend, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 0},
        {"softcap": 0.0},
        {"softcap": None},
        {"window": (None, None)},
        {"window": [2**70, 7]},
        {"sinks": [-np.inf] * 8},
        {"query_lengths": 5, "kv_lengths": np.uint8(7)},
        {"query_positions": np.arange(5), "key_positions": [list(range(7))] * 2},
        {"dropout_p": 0},
        {"dropout_p": np.float32(0)},
        {"rng": None},
        {"rng": 7},
        {"rng": np.random.default_rng(7)},
    ],
)
def test_what_is_off_changes_nothing(changes: dict[str, Any]) -> None:
    np.testing.assert_array_equal(attend(**changes), attend())


def test_out_is_untouched_by_a_refused_call() -> None:
    out = np.full_like(OUT, 7)
    refusal(ValueError, attend, out=out, attn_mask=np.ones((4, 4), bool))
    assert (out == 7).all()


def wide(*shape: int) -> np.ndarray:
    """As many elements as one may ask for, in the memory of one."""
    return np.broadcast_to(np.float16(0), shape)


@pytest.mark.parametrize(
    ("arrays", "changes", "came"),
    [
        ((wide(2**40, 1), wide(5, 1), wide(5, 2**30)), {}, "out would have shape (1099511627776, 1073741824)"),
        ((wide(2**61, 1), wide(5, 1), wide(5, 0)), {"return_lse": True}, "lse would have shape (2305843009213693952,)"),
        ((wide(2**40, 1), wide(2**40, 1), wide(2**40, 1)), {"return_weights": True}, "weights would have shape (1099"),
    ],
)
def test_a_result_that_no_memory_holds(arrays: Any, changes: dict[str, Any], came: str) -> None:
    message = refusal(MemoryError, scaled_dot_product_attention, *arrays, **changes)
    assert message.startswith(came)
    assert "; an array that memory can hold was wanted: " in message


HELPERS = [
    (ValueError, repeat_kv, (KEY, 0), "n_rep is 0; at least 1 was wanted: pass n_rep=1 or more"),
    (TypeError, repeat_kv, (KEY, 1.5), "n_rep is 1.5, a float; an int was wanted: "),
    (TypeError, repeat_kv, (KEY, True), "n_rep is True; an int was wanted: "),
    (TypeError, repeat_kv, (KEY, np.array([2, 2])), "n_rep is a numpy.ndarray; an int was wanted: "),
    (TypeError, repeat_kv, (KEY, np.array(2.0)), "n_rep is a numpy.ndarray; an int was wanted: "),
    (ValueError, repeat_kv, (KEY, 2**62), "n_rep is 4611686018427387904; a result that NumPy can address was wanted "),
    (ValueError, repeat_kv, (KEY, 10**30), "n_rep is 1000000000000000000000000000000; a result that NumPy can "),
    (TypeError, repeat_kv, (KEY, 2, np.array([1, 2])), "axis is a numpy.ndarray; an int was wanted: "),
    (
        ValueError,
        repeat_kv,
        (KEY[0, 0], 2),
        "axis is -3; an axis of x (7, 16) was wanted: pass x as (..., heads, S, D)",
    ),
    (ValueError, repeat_kv, (KEY, 2, 4), "axis is 4; an axis of x (2, 2, 7, 16) was wanted: "),
    (TypeError, repeat_kv, (KEY, 2, "heads"), "axis is 'heads', a str; an int was wanted: "),
    (TypeError, repeat_kv, (None, 2), "x is None; an array "),
    (TypeError, repeat_kv, (np.ma.ones((2, 2, 2)), 2), "x is a masked array; "),
    (ValueError, kv_cache_nbytes, (1, -1, 8, 128), "seq_len is -1; at least 0 was wanted: pass seq_len=0 or more"),
    (TypeError, kv_cache_nbytes, (1, 1.0, 8, 128), "seq_len is 1.0, a float; an int was wanted: "),
    (TypeError, kv_cache_nbytes, (1, 1, 8, None), "head_dim is None; an int was wanted: "),
    (ValueError, set_num_threads, (0,), "n is 0; at least 1 was wanted: pass n=1 or more"),
    (TypeError, set_num_threads, (2.0,), "n is 2.0, a float; an int was wanted: "),
    (TypeError, set_num_threads, (True,), "n is True; an int was wanted: "),
]


@pytest.mark.parametrize(("error", "call", "args", "text"), HELPERS)
def test_helpers(error: type[Exception], call: Any, args: tuple[Any, ...], text: str) -> None:
    assert refusal(error, call, *args).startswith(text)


@pytest.mark.parametrize("dtype", [None, "float17", object, "U", "(2,-1)f4", "f4,(", "\ud800"])
def test_kv_cache_nbytes_wants_a_dtype(dtype: Any) -> None:
    message = refusal(TypeError, kv_cache_nbytes, 1, 1, 1, 1, dtype=dtype)
    assert message.endswith('a dtype was wanted: pass dtype="float16", "bfloat16" or "float32"')


@pytest.mark.parametrize(
    ("name", "error"), [("sse9", ValueError), ("", ValueError), ("avx2\0", ValueError), (3, TypeError)]
)
def test_use_isa_lists_what_there_is(name: Any, error: type[Exception]) -> None:
    there = ", ".join(testing.available_isas())
    with pytest.raises(error, match=rf"use_isa\(\): name is .*: pass one of {there}"), testing.use_isa(name):
        pass


CORE = [
    ("attention", ()),
    ("attention", (1,) * 11),
    ("attention", (QUERY, KEY, VALUE, None, 1, 0, None, True, None, None, False)),
    ("attention", (QUERY, KEY, VALUE, None, False, 2, None, True, None, None, False)),
    ("attention", (QUERY, KEY, VALUE, None, False, 0, 2, True, None, None, False)),
    *(("attention", (QUERY, KEY, VALUE, None, False, 0, scale, True, None, None, False)) for scale in (1e39, 1e-39)),
    ("attention", (QUERY, KEY, VALUE, None, False, 0, None, True, None, read_only(), False)),
    ("attention", (KEY.astype(np.int64),) * 3 + (None, False, 0, None, True, None, None, False)),
    ("pool_heads", ()),
    ("pool_heads", (1,) * 6),
    ("pool_heads", (QUERY, QUERY.copy(), 0, 2, KEY, None)),
    ("pool_heads", (QUERY, QUERY.copy(), 0, 2, np.zeros((1, 2), np.int64), np.ones((2, 1)))),
    ("set_num_threads", (2**40,)),
    ("set_num_threads", ("2",)),
]


def only(place: int, thing: Any) -> tuple[Any, ...]:
    """All rules off but one."""
    return (*NO_RULES[:place], thing, *NO_RULES[place + 1 :])


CORE += [
    ("attention", (QUERY, KEY, VALUE, None, False, 0, None, True, rules, None, False))
    for rules in (
        1,
        NO_RULES[:-1],
        list(NO_RULES),
        *(only(place, thing) for place, thing in ((0, -1), (1, 2**63), (1, 1.0))),
        *(only(2, softcap) for softcap in (-1.0, float("nan"), 1e39, 1e-39)),
        *(only(place, array) for place in range(9) for array in (QUERY[0, 0], np.arange(11))),
        only(5, np.array([1, 8])),
        only(6, np.array(-1)),
        only(11, 1.5),
    )
]


@pytest.mark.parametrize(("name", "args"), CORE)
def test_the_core_trusts_nobody(name: str, args: tuple[Any, ...]) -> None:
    """Called round its Python face it still refuses what it cannot take."""
    with pytest.raises((TypeError, ValueError)):
        getattr(gqa_ext._core, name)(*args)
