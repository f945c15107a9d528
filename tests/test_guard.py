"""Kernels touch nothing outside the arrays: every operand lies flush against an inaccessible page.

The sweep runs in a process of its own, as a fault would end it; faulthandler then shows the call,
and the last line printed names the sizes.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]

QUERY_SIZES = (1, 2, 3, 5, 8, 9, 17, 33, 48, 49, 97)
KEY_SIZES = (1, 2, 3, 4, 5, 7, 9, 15, 17, 31, 33, 65, 127, 128, 129, 130, 257, 515)
HEAD_DIMS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 129)


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operands_beside_inaccessible_pages(dtype: str, isa: str) -> None:
    command = [sys.executable, "-X", "faulthandler", __file__, isa, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} after {last}\n{done.stderr[-3000:]}"
    assert last == ["done"]


def test_the_guard_works() -> None:
    """A read one byte past either end ends the process; else the sweep would prove nothing."""
    for place, offset in (("end", 1), ("start", -1)):
        code = (
            f"import test_guard, ctypes, numpy as np\n"
            f"x = test_guard.guarded(np.ones(3, np.uint8), {place!r})\n"
            f"ctypes.string_at(x.ctypes.data + {2 if place == 'end' else 0}, 1)\n"
            f"print('fine', flush=True)\n"
            f"ctypes.string_at(x.ctypes.data + {2 if place == 'end' else 0} + {offset}, 1)\n"
        )
        command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == "fine\n"
        assert done.returncode < 0


def guarded(x: Array, place: str) -> Array:
    """A copy of x whose last byte (place "end") or first byte ("start") borders a page without access."""
    page = mmap.PAGESIZE
    room = -(-max(1, x.nbytes) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for wall in (address, address + page + room):
        if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (room - x.nbytes if place == "end" else 0)
    # A bytes view from offset on, so that an array of any dtype, aligned or not, can lie there.
    raw = np.frombuffer(memory, np.uint8, x.nbytes, offset)
    copy = raw.view(x.dtype).reshape(x.shape) if x.size else x.copy()
    copy[...] = x
    return copy


def sweep(isa: str, dtype: str) -> None:
    """Calls of many sizes with all operands at the ends, then at the starts, of their pages."""
    import gqa_ext

    rng = np.random.default_rng(0)
    sizes = [(q, k, 17) for q, k in itertools.product(QUERY_SIZES, KEY_SIZES)]
    sizes += [(q, 35, d) for q, d in itertools.product((1, 3, 20), HEAD_DIMS)]
    with gqa_ext.testing.use_isa(isa):
        for number, (seq_q, seq_k, head_dim) in enumerate(sizes):
            v_head_dim = HEAD_DIMS[number % len(HEAD_DIMS)]
            shapes = ((1, 2, seq_q, head_dim), (1, 1, seq_k, head_dim), (1, 1, seq_k, v_head_dim))
            plain = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
            plain.append(mask_of(number, rng.random((2, seq_q, seq_k)) < 0.8))
            for place in ("end", "start"):
                print(isa, dtype, number, seq_q, seq_k, head_dim, v_head_dim, plain[-1].dtype, place, flush=True)
                call(plain, place, causal=number % 2 == 0)
    print("done", flush=True)


def mask_of(number: int, keep: Array) -> Array:
    """Masks of all dtypes by turns."""
    import ml_dtypes

    dtypes = (np.bool_, np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
    dtype = np.dtype(dtypes[number % len(dtypes)])
    return keep if dtype == np.bool_ else np.where(keep, 0.5, -np.inf).astype(dtype)


def call(plain: list[Array], place: str, *, causal: bool) -> None:
    """One call with guarded operands, as they lie and in the layouts that kernels cannot read in place."""
    import gqa_ext

    rules = {"is_causal": causal, "causal_alignment": "lower_right"}
    wanted = gqa_ext.scaled_dot_product_attention(*plain, **rules)
    operands = [guarded(x, place) for x in plain]
    out = guarded(np.zeros_like(wanted), place)
    gqa_ext.scaled_dot_product_attention(*operands, **rules, out=out)
    assert np.array_equal(out, wanted)
    swapped = [guarded(x.astype(x.dtype.newbyteorder()), place) for x in plain[:3]]
    assert np.array_equal(gqa_ext.scaled_dot_product_attention(*swapped, operands[3], **rules), wanted)
    flipped = [guarded(x[..., ::-1, ::-1], place)[..., ::-1, ::-1] for x in plain]
    assert np.array_equal(gqa_ext.scaled_dot_product_attention(*flipped, **rules), wanted)


if __name__ == "__main__":
    sweep(*sys.argv[1:])
