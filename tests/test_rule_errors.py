"""Every bad rule raises the right exception, and its message helps: test_errors.py for the rules of the score stage,
for merge_attention and for get_alibi_slopes."""

from __future__ import annotations

import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gqa_ext import get_alibi_slopes, merge_attention, scaled_dot_product_attention

pytestmark = pytest.mark.quick

QUERY = np.ones((2, 8, 5, 16), np.float32)
KEY = np.ones((2, 2, 7, 16), np.float32)
OUT, LSE = np.ones((2, 8, 5, 9), np.float32), np.zeros((2, 8, 5), np.float32)


def refusal(error: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    """The message after "call(): "; exactly this exception, and what came, what was wanted and the fix in it."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    head, _, message = str(caught.value).partition("(): ")
    assert head == call.__name__
    assert re.fullmatch(r".+; .+: .+", message), message
    return message


def attend(query: Any = QUERY, key: Any = KEY, **rules: Any) -> Any:
    return scaled_dot_product_attention(query, key, key, **rules)


attend.__name__ = "scaled_dot_product_attention"

VALUES = [
    ({"window": (-1, 0)}, "window is (-1, 0); sizes of at least 0 were wanted; FlashAttention's -1 is None here: "
                          "pass window=(None, 0)"),
    ({"window": (4, -7)}, "window is (4, -7); sizes of at least 0 were wanted"),
    ({"window": np.array([-1, -1])}, ": pass window=(None, None)"),
    ({"window": (1, 2, 3)}, "window has 3 items; (left, right) was wanted"),
    ({"window": ()}, "window has 0 items; (left, right) was wanted"),
    ({"softcap": -1}, "softcap is -1.0; a finite number of at least 0 was wanted, 0 or None to "),
    ({"softcap": np.inf}, "softcap is inf; a finite number"),
    ({"softcap": 1e39}, "softcap is 1e+39; 0 or a size from 1.18e-38 to 3.4e+38 was wanted, as scores are made in "
                        "float32: pass float64 arrays, or leave it out where it is that large"),
    ({"softcap": 1e-46}, "softcap is 1e-46; 0 or a size from"),
    ({"softcap": np.float32("nan")}, "softcap is nan; a finite number"),
    ({"alibi_slopes": np.ones(7)}, "alibi_slopes has shape (7,); (query heads,) or (..., query heads) was wanted"),
    ({"alibi_slopes": np.ones((3, 8))}, "alibi_slopes has shape (3, 8); "),
    ({"alibi_slopes": np.ones((1, 2, 8))}, "pass gqa_ext.get_alibi_slopes(8)"),
    ({"alibi_slopes": np.ones((8, 1))}, "alibi_slopes has shape (8, 1); "),
    ({"alibi_slopes": [np.nan] * 8}, "alibi_slopes has a NaN; numbers were wanted: pass the slopes"),
    ({"sinks": np.zeros(2)}, "sinks has shape (2,); one logit for each query head, (8,), was wanted: pass 8 numbers"),
    ({"sinks": np.zeros((2, 8))}, "sinks has shape (2, 8); one logit"),
    ({"sinks": np.zeros(1)}, "sinks has shape (1,); one logit"),
    ({"sinks": 0.0}, "sinks has shape (); one logit"),
    ({"kv_lengths": 8}, "kv_lengths is 8; from 0 to the number of key rows, 7, was wanted (query (2, 8, 5, 16), key"),
    ({"kv_lengths": [7, -1]}, "kv_lengths[1] is -1; from 0 to the number of key rows, 7"),
    ({"kv_lengths": np.array([[3]], np.int8)}, "kv_lengths has shape (1, 1); one length for each sequence was wanted, "
                                               "broadcasting to (2,)"),
    ({"kv_lengths": [1, 2, 3]}, "kv_lengths has shape (3,); one length for each sequence"),
    ({"kv_lengths": []}, "kv_lengths has shape (0,); one length for each sequence"),
    ({"kv_lengths": np.array([1, 2**63], np.uint64)}, "kv_lengths has 9223372036854775808; numbers that an int64"),
    ({"query_lengths": [6, 5]}, "query_lengths[0] is 6; from 0 to the number of query rows, 5, was wanted"),
    ({"query_lengths": np.array([1, -2**63])}, "query_lengths[1] is -9223372036854775808; from 0 to"),
    ({"query_positions": np.arange(7)}, "query_positions has shape (7,); one position for each row was wanted, "
                                        "broadcasting to (2, 5)"),
    ({"query_positions": np.zeros((3, 5), int)}, "query_positions has shape (3, 5); "),
    ({"query_positions": np.zeros((2, 1, 5), int)}, "query_positions has shape (2, 1, 5); "),
    ({"query_positions": np.array([2**64 - 1], np.uint64)}, "query_positions has 18446744073709551615; "),
    ({"key_positions": np.arange(5)}, "key_positions has shape (5,); one position for each row was wanted, "
                                      "broadcasting to (2, 7)"),
    ({"key_positions": np.zeros((2, 8, 7), int)}, "pass 7 positions, or (2, 7)"),
    ({"query_positions": np.arange(5), "causal_alignment": "upper_left"},
     "query_positions is given beside causal_alignment 'upper_left'; one of them was wanted, "),
    ({"query_positions": np.arange(5), "causal_alignment": "lower_right", "is_causal": True},
     "beside causal_alignment 'lower_right'"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "text"), VALUES, ids=str)
def test_shapes_and_values(rules: dict[str, Any], text: str) -> None:
    assert text in refusal(ValueError, attend, **rules)


@pytest.mark.parametrize("shape", [(), (8,), (3, 8)])
def test_without_a_batch_a_length_is_one_number(shape: tuple[int, ...]) -> None:
    arrays = {"query": QUERY[0], "key": KEY[0]} if shape != (8,) else {"query": QUERY[0, 0], "key": KEY[0, 0]}
    if shape == ():
        attend(**arrays, kv_lengths=3)
        return
    message = refusal(ValueError, attend, **arrays, kv_lengths=np.ones(shape, int))
    assert message.startswith(f"kv_lengths has shape {shape}; ")
    assert message.endswith("pass one int")


TYPES = [
    ({"window": 4}, "window is 4, an int; (left, right) was wanted, each a number of positions or None for all of "
                    "them: pass window=(4, 0) for the 4 keys before each row and its own"),
    ({"window": -1}, "window is -1, an int; (left, right) was wanted"),
    ({"window": np.array(3)}, ": pass window=(3, 0) for"),
    ({"window": True}, "window is True; (left, right)"),
    ({"window": "12"}, "window is '12', a str; (left, right)"),
    ({"window": (2.0, 0)}, "window is (2.0, 0); whole numbers were wanted, or None for an open side: pass ints"),
    ({"window": (True, 0)}, "window is (True, 0); whole numbers"),
    ({"window": (np.arange(2), 0)}, "whole numbers were wanted"),
    ({"softcap": "50"}, "softcap is '50', a str; a real number was wanted: pass a float, or None"),
    ({"softcap": True}, "softcap is True; a real number"),
    ({"softcap": np.ones(8)}, "softcap is a numpy.ndarray; a real number"),
    ({"alibi_slopes": True}, "alibi_slopes is True; an array of numbers was wanted"),
    ({"alibi_slopes": np.ones(8, bool)}, "alibi_slopes has dtype bool; float16, bfloat16, float32 or float64 was"),
    ({"alibi_slopes": np.ones(8, complex)}, "alibi_slopes has dtype complex128; float16"),
    ({"alibi_slopes": np.ma.ones(8)}, "alibi_slopes is a masked array; a plain array was wanted: "
                                      "pass alibi_slopes.filled(...)"),
    ({"alibi_slopes": [object()] * 8}, "alibi_slopes is a list of Python objects; an array of numbers"),
    ({"sinks": np.ones(8, bool)}, "sinks has dtype bool; float16"),
    ({"sinks": np.ones(8, "M8[s]")}, "sinks has dtype datetime64[s]; float16"),
    ({"sinks": np.ma.zeros(8)}, "sinks is a masked array; "),
    ({"sinks": "eight"}, "sinks is 'eight', a str; an array of numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "text"), TYPES, ids=str)
def test_types(rules: dict[str, Any], text: str) -> None:
    assert text in refusal(TypeError, attend, **rules)


INTEGERS = ("query_lengths", "kv_lengths", "query_positions", "key_positions")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bool", "complex64", "m8[s]"])
def test_integers_of_another_dtype(name: str, dtype: str) -> None:
    array = np.ones((2, 5 if name.startswith("query") else 7), dtype)
    message = refusal(TypeError, attend, **{name: array[:, 0] if name.endswith("lengths") else array})
    assert message.startswith(f"{name} has dtype {array.dtype}; an array of integers was wanted: ")
    if dtype == "bool" and name.endswith("lengths"):
        assert message.endswith(f"count what is there, as in {name}.sum(-1), or pass it as attn_mask")
    else:
        assert message.endswith(f"pass {name}.astype(np.int64)")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("thing", [True, "3", [2**70], np.ma.ones(2, int), 2.5, [1.0, 2.0]], ids=repr)
def test_integers_of_another_type(name: str, thing: Any) -> None:
    assert refusal(TypeError, attend, **{name: thing}).startswith(f"{name} ")


def test_a_refused_rule_leaves_out_alone() -> None:
    out = np.full((2, 8, 5, 16), 7, np.float32)
    for rules in ({"kv_lengths": 9}, {"alibi_slopes": np.ones(3)}, {"window": (-1, -1)}):
        refusal(ValueError, attend, out=out, **rules)
    assert (out == 7).all()


def test_query_positions_say_what_causal_means() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(is_causal=True, query_positions=np.arange(5))
        attend(key_positions=np.arange(7), window=(2, 2))
    with pytest.warns(UserWarning, match="5 query rows and 7 key rows"):
        attend(is_causal=True, key_positions=np.arange(7), kv_lengths=5)


# ---- merge_attention, get_alibi_slopes ----

MERGE = [
    (ValueError, ([], []), "outs has 0 parts and lses has 0; one of each for every part was wanted"),
    (ValueError, ([OUT, OUT], [LSE]), "outs has 2 parts and lses has 1; "),
    (ValueError, (OUT[0, 0], LSE[0, 0]), "outs[0] has shape (9,); (..., rows, features) was wanted"),
    (ValueError, ([OUT], [LSE[..., None]]), "lses[0] has shape (2, 8, 5, 1) for outs[0] (2, 8, 5, 9); (2, 8, 5) was"),
    (ValueError, ([OUT, OUT], [LSE, LSE[:1]]), "lses[1] has shape (1, 8, 5) for outs[1] (2, 8, 5, 9); "),
    (ValueError, ([OUT, OUT[:1]], [LSE, LSE[:1]]), "outs[1] has shape (1, 8, 5, 9) but outs[0] has (2, 8, 5, 9); "),
    (TypeError, ([OUT, OUT.astype(np.float64)], [LSE, LSE]), "outs[1] has dtype float64 but outs[0] has float32; "),
    (TypeError, ([OUT, OUT], [LSE, LSE.astype(float)]), "lses[1] has dtype float64 but lses[0] has float32; "),
    (TypeError, ([OUT.astype(int)], [LSE]), "outs[0] has dtype int64; float16, bfloat16, float32 or float64 was"),
    (TypeError, ([OUT], [LSE.astype(bool)]), "lses[0] has dtype bool; "),
    (TypeError, ([OUT], [np.ma.array(LSE)]), "lses[0] is a masked array; "),
    (TypeError, ([None], [LSE]), "outs[0] is None; "),
    (TypeError, (None, [LSE]), "outs is None; a sequence of arrays, one for each part, was wanted: pass outs as"),
    (TypeError, ([OUT], 1.0), "lses is 1.0, a float; a sequence of arrays"),
]


@pytest.mark.parametrize(("error", "args", "text"), MERGE)
def test_merge(error: type[Exception], args: tuple[Any, Any], text: str) -> None:
    assert refusal(error, merge_attention, *args).startswith(text)


@pytest.mark.parametrize(("error", "thing"), [(ValueError, 0), (ValueError, -8), (TypeError, 8.0), (TypeError, None)])
def test_alibi_slopes(error: type[Exception], thing: Any) -> None:
    assert refusal(error, get_alibi_slopes, thing).startswith(f"num_heads is {thing}")


def test_halves_mix_with_float32() -> None:
    """What the message of mixed float64 offers works."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert attend(QUERY.astype(dtype)).dtype == dtype
        assert attend(QUERY, KEY.astype(dtype)).dtype == np.float32
