"""The node tests that the ONNX project publishes for its Attention operator, expressed in our call.

Each model's own inputs go through `call_of`, which is all there is to the translation, and the
operator's published output Y must come out.  What has no counterpart is in NOT_RETURNED and
NOT_EXPRESSIBLE, with the reason; nothing else is left out, as the last test checks.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from bounds import check
from numpy.typing import NDArray
from reference import Problem
from rules import attend

onnx = pytest.importorskip("onnx", minversion="1.23", reason="the published node tests come with onnx >= 1.23")

Array = NDArray[Any]

# Operators whose name holds "attention" and that are something else.
NOT_EXPRESSIBLE = {
    "FlexAttention": "score_mod and prob_mod are graphs of operators; without them it is test_attention_4d again",
    "LinearAttention": "a recurrence without softmax",
}
# Values of qk_matmul_output_mode: outputs beside Y that the tests with that name ask for.
NOT_RETURNED = {
    0: "scores before the softmax are never stored",
    1: "scores before the softmax are never stored",
    2: "scores before the softmax are never stored",
}
WEIGHTS = 3  # the mode whose output return_weights gives


def node_tests() -> dict[str, Any]:
    """Tests of single Attention nodes by name; "_expanded" ones are the same data for a graph of plain operators."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow in the making of other operators' tests
        every = load_model_tests(kind="node")
    named = (test for test in every if "attention" in test.name and "_expanded" not in test.name)
    return {test.name: test for test in named}


TESTS = node_tests()
EXPRESSIBLE = [name for name, test in TESTS.items() if test.model.graph.node[0].op_type == "Attention"]


def call_of(node: Any, given: dict[str, Array]) -> Problem:
    """Our arguments for a node's inputs by name and its attributes."""
    attribute = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    query, key, value = (given[name] for name in "QKV")
    if query.ndim == 3:  # (B, S, H * D)
        heads = attribute["q_num_heads"], attribute["kv_num_heads"], attribute["kv_num_heads"]
        query, key, value = (split_heads(x, n) for x, n in zip((query, key, value), heads, strict=True))
    rules: dict[str, Any] = {"is_causal": bool(attribute.get("is_causal", 0))}
    if "past_key" in given:
        key, value = (np.concatenate((given[f"past_{x}"], y), axis=2) for x, y in (("key", key), ("value", value)))
        rules["query_positions"] = given["past_key"].shape[2] + np.arange(query.shape[2])
    if "nonpad_kv_seqlen" in given:
        rules |= {"kv_lengths": given["nonpad_kv_seqlen"], "causal_alignment": "lower_right"}
    sides = (attribute.get("left_window_size", -1), attribute.get("right_window_size", -1))
    rules["window"] = tuple(None if side == -1 else side for side in sides)
    rules |= {name: attribute[name] for name in ("scale", "softcap") if name in attribute}
    return Problem(query, key, value, padded(given.get("attn_mask"), key.shape[2]), **rules)


def split_heads(x: Array, heads: int) -> Array:
    """(B, S, H * D) as (B, H, S, D), in place."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def padded(mask: Array | None, seq_k: int) -> Array | None:
    """A mask shorter than the keys says that the rest are masked."""
    if mask is None or mask.shape[-1] == seq_k:
        return mask
    wide = np.full((*mask.shape[:-1], seq_k), False if mask.dtype == np.bool_ else -np.inf, mask.dtype)
    wide[..., : mask.shape[-1]] = mask
    return wide


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_published_output(name: str, isa: str) -> None:
    """Within the test's own tolerance, or a few roundings of the halves that the reference computes in."""
    test = TESTS[name]
    node = test.model.graph.node[0]
    for inputs, outputs in test.data_sets:
        given = dict(zip([x for x in node.input if x], inputs, strict=True))
        call = call_of(node, given)
        out, lse = attend(call)
        check(out, call, lse=lse, isa=isa, label=name)
        wanted = outputs[0] if outputs[0].ndim == 4 else split_heads(outputs[0], call.query.shape[1])
        near(out, wanted, test)
        if WEIGHTS in output_modes(node):
            _, _, weights = attend(call, return_weights=True)
            near(weights.astype(outputs[-1].dtype), outputs[-1], test)


def output_modes(node: Any) -> list[int]:
    """What the fourth output is to be, where there is one."""
    if len(node.output) < 4:
        return []
    modes = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "qk_matmul_output_mode")
    return [next(modes, 0)]


def near(got: Array, wanted: Array, test: Any) -> None:
    """Elements (B, H, S, D) of our output and of the published one."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    rounding = {"float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7}.get(got.dtype.name, 0.0)
    np.testing.assert_allclose(
        got.astype(np.float64), wanted.astype(np.float64), rtol=max(test.rtol, rounding), atol=max(test.atol, rounding)
    )


def test_every_published_test_is_run_or_explained() -> None:
    """A newer onnx with operators or outputs that the tables do not name fails here."""
    assert len(EXPRESSIBLE) >= 85
    for name, test in TESTS.items():
        node = test.model.graph.node[0]
        if name not in EXPRESSIBLE:
            assert node.op_type in NOT_EXPRESSIBLE, name
            continue
        assert {x for x in node.input if x} <= {
            "Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"
        }, name  # fmt: skip
        assert set(node.output) <= {"", "Y", "present_key", "present_value", "qk_matmul_output"}, name
        assert set(output_modes(node)) <= {WEIGHTS, *NOT_RETURNED}, name
