"""Paragraphs of documentation that several calls share, written once and filled in by :func:`shared_docs`."""

import textwrap
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PARAGRAPHS = {
    "query_key_value": """\
query : array_like, (..., Hq, Sq, D), float16, bfloat16, float32 or float64
    Two dimensions mean one head. The leading ones broadcast as in ``np.matmul``. Any strides and byte
    order are read in place; what is no ndarray goes through ``np.asarray``. bfloat16 is ml_dtypes'.
key, value : array_like, (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv), any of these dtypes
    Query head h reads key and value head h // (Hq // Hkv), so Hq must be a multiple of Hkv. Sums are
    made in float32. float64 goes only with float64 and is computed in float64. A weight below 2**-102 of
    the row's largest (2**-969 in float64) counts as 0. Values are summed, each times exp(its score - the
    largest so far), before the sum is divided: where abs(value) adds up to more than the largest float over
    a row's keys, the output can be inf or NaN, though the mean is finite. With the ISAs amx_bf16 and
    avx512_bf16 (the latter unasked only on AMD), bfloat16 queries, keys and values of an even D are
    multiplied as they are: scores are scaled after their sums, and numbers, products and sums below 2**-126
    count as 0.""",
    "attn_mask": """\
attn_mask : array_like of bool or float, optional
    Broadcasts to (..., Hq, Sq, Sk) and never widens it. bool: True where a key may be seen. float16,
    bfloat16, float32 or float64, whatever the dtype of query: added to the scaled scores; exactly -inf
    masks. A masked key is dropped: NaN there cannot reach the row. A row with no key left gives 0.""",
    "rules": """\
causal_alignment : {None, 'upper_left', 'lower_right'}
    Where query row i stands among the keys, its position p_i. 'upper_left' (None means this too, as in
    torch): i. 'lower_right': i + Sk - Sq, so that the last row sees all keys; for decoding and chunked
    prefill. With lengths those of the sequence count: i + kv_length - query_length. Key j stands at j.
window : (int or None, int or None), optional
    A row sees the keys with p_i - left <= p_j <= p_i + right, beside all else that masks; None is open
    (FlashAttention's -1). Mistral's sliding_window=W is (W - 1, 0).
softcap : float, optional
    Scaled scores s become softcap * tanh(s / softcap), before masks and biases (Gemma 2,
    arXiv:2408.00118). None or 0 leaves them as they are.
alibi_slopes : array_like, (Hq,) or (..., Hq), optional
    slope * abs(p_i - p_j) is taken from each score (arXiv:2108.12409); see ``get_alibi_slopes``.
sinks : array_like, (Hq,), optional
    One more logit for each row of a head, as it is, not scaled: counted in the sum and in the LSE, with
    no value (gpt-oss; StreamingLLM, arXiv:2309.17453). -inf is none.
query_lengths, kv_lengths : array_like of int, broadcasting to the leading dimensions, optional
    How many rows of each sequence are there, from the first. Rows past a length give 0 and an LSE of
    -inf; keys past it are never read.
query_positions, key_positions : array_like of int, broadcasting to (..., Sq) and (..., Sk), optional
    Replace p_i and p_j in causality, window and ALiBi. A negative key position says that there is no
    such key, as in left padding. query_positions excludes causal_alignment.
rng : int, np.random.Generator or None
    Where dropout's seed comes from: an int is the seed, a Generator gives one number for each call, None one
    by chance.""",
    "out": """\
return_lse : bool
    Also return the natural logarithm of the sum of exponentials of each row's scores, -inf for a row
    with no key (its sink, where there is one). ``merge_attention`` needs it.
return_weights : bool
    Also return what multiplied value, after dropout: an array of Sq x Sk numbers for each query head.
out : ndarray, optional
    Where to write: exactly the shape and dtype of the result, any strides. May be query itself. Any
    other overlap with an input goes through a temporary.

Returns
-------
out : ndarray, (..., Hq, Sq, Dv)
    In query's dtype; a new array is C-contiguous and of native byte order.
lse : ndarray, (..., Hq, Sq)
    With ``return_lse`` only; float32, or float64 beside float64.
weights : ndarray, (..., Hq, Sq, Sk)
    With ``return_weights`` only, last; of lse's dtype, 0 where a slot is masked.""",
    "raises": """\
Raises
------
ValueError
    A shape or a value breaks the rules above. The message says which and how to mend it.
TypeError
    A dtype or a type does: integers, complex numbers, np.ma, float32 beside float64.""",
}


def shared_docs(function: Callable[P, R]) -> Callable[P, R]:
    """Replace each ``{name}`` that is a line of the docstring by the paragraph of that name."""
    text = function.__doc__ or ""  # None under python -OO
    for name, paragraph in PARAGRAPHS.items():
        text = text.replace(f"    {{{name}}}", textwrap.indent(paragraph, "    "))
    function.__doc__ = text
    return function
