"""The samples that PyTorch tests its own scaled_dot_product_attention with, through both calls.

They come from torch's OpInfo database, a private module: where a torch release moves it, the
test is skipped and says so.  Samples with dropout are left out, as no two generators agree.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from bounds import check
from numpy.typing import NDArray
from reference import Problem

import gqa_ext

torch = pytest.importorskip("torch", reason="the samples are torch's")
database = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="this torch has its OpInfo database elsewhere, or lacks what that imports (expecttest)",
    exc_type=ImportError,
)
torch.set_num_threads(1)

Array = NDArray[Any]
NAME = "nn.functional.scaled_dot_product_attention"


def samples(dtype: str) -> list[tuple[list[Any], dict[str, Any]]]:
    """Arguments of the samples without dropout, on the CPU."""
    (info,) = [op for op in database.op_db if op.name == NAME]
    torch.manual_seed(0)
    every = [((s.input, *s.args), s.kwargs) for s in info.sample_inputs("cpu", getattr(torch, dtype))]
    return [(list(args), dict(rules)) for args, rules in every if not rules.get("dropout_p")]


def numpy_of(x: Any) -> Any:
    """A tensor as an array; bfloat16 by its bits."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_samples(dtype: str, isa: str) -> None:
    """Ours against the oracle, and torch's answer against ours, which in halves torch rounds on the way."""
    several = samples(dtype)
    assert len(several) > 10
    for args, rules in several:
        wanted = numpy_of(torch.nn.functional.scaled_dot_product_attention(*args, **rules))
        given, named = [numpy_of(x) for x in args], {name: numpy_of(x) for name, x in rules.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            got = gqa_ext.scaled_dot_product_attention(*given, **named)
        named.pop("dropout_p", None)
        check(got, Problem(*given, **named), isa=isa, label=f"{[x.shape for x in given]} {sorted(rules)}")
        eps = {"float64": 1e-13, "float32": 1e-5, "float16": 2.0**-8, "bfloat16": 2.0**-5}[dtype]
        np.testing.assert_allclose(
            got.astype(np.float64), wanted.astype(np.float64), rtol=eps, atol=eps * float(np.abs(given[2]).max())
        )
