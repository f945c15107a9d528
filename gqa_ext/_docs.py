"""Paragraphs of documentation that several calls share, written once and filled in by :func:`shared_docs`."""

import textwrap
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PARAGRAPHS = {
    "query_key_value": """\
query : array_like, (..., Hq, Sq, D), float32 or float64
    Two dimensions mean one head. The leading ones broadcast as in ``np.matmul``. Any strides and byte
    order are read in place; what is no ndarray goes through ``np.asarray``.
key, value : array_like, (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv), query's dtype
    Query head h reads key and value head h // (Hq // Hkv), so Hq must be a multiple of Hkv.""",
    "attn_mask": """\
attn_mask : array_like of bool or float, optional
    Broadcasts to (..., Hq, Sq, Sk) and never widens it. bool: True where a key may be seen. float16,
    bfloat16, float32 or float64, whatever the dtype of query: added to the scaled scores; exactly -inf
    masks. A masked key is dropped: NaN there cannot reach the row. A row with no key left gives 0.""",
    "rules": """\
causal_alignment : {None, 'upper_left', 'lower_right'}
    Which query row belongs to which key. 'upper_left' (None means this too, as in torch): row i sees the
    keys up to i. 'lower_right': up to i + Sk - Sq, so that the last row sees all; for decoding and
    chunked prefill.
window, softcap, alibi_slopes, sinks, query_lengths, kv_lengths, query_positions, key_positions, return_weights, rng
    Not implemented yet, nor is ``dropout_p`` other than 0: NotImplementedError when switched on.""",
    "out": """\
return_lse : bool
    Also return the natural logarithm of the sum of exponentials of each row's scores, -inf for a row
    with no key.
out : ndarray, optional
    Where to write: exactly the shape and dtype of the result, any strides. May be query itself. Any
    other overlap with an input goes through a temporary.

Returns
-------
out : ndarray, (..., Hq, Sq, Dv)
    In query's dtype; a new array is C-contiguous and of native byte order.
lse : ndarray, (..., Hq, Sq)
    With ``return_lse`` only; float32, or float64 beside float64.""",
    "raises": """\
Raises
------
ValueError
    A shape or a value breaks the rules above. The message says which and how to mend it.
TypeError
    A dtype or a type does: integers, complex numbers, np.ma, float32 beside float64.
NotImplementedError
    A keyword or a dtype (float16, bfloat16) is not implemented yet.""",
}


def shared_docs(function: Callable[P, R]) -> Callable[P, R]:
    """Replace each ``{name}`` that is a line of the docstring by the paragraph of that name."""
    text = function.__doc__ or ""  # None under python -OO
    for name, paragraph in PARAGRAPHS.items():
        text = text.replace(f"    {{{name}}}", textwrap.indent(paragraph, "    "))
    function.__doc__ = text
    return function
