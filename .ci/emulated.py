"""The built module on an emulated CPU: it takes the kernels it should and agrees with the oracle.

    qemu-x86_64 -cpu Haswell python .ci/emulated.py avx2

Called by .ci/run with the module on PYTHONPATH.  An illegal instruction kills the process.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import bounds
import numpy as np
from reference import Problem

from gqa_ext import cpu_info, scaled_dot_product_attention

# (query shape, key shape, head_dim of value): tile edges, tails of every lane width, decode, groups
SHAPES = [
    ((4, 1, 64), (2, 1, 64), 64),
    ((6, 1, 80), (2, 130, 80), 72),
    ((2, 3, 50, 33), (2, 1, 70, 33), 17),
    ((1, 5, 97, 16), (1, 5, 129, 16), 16),
    ((71, 7, 9), (1, 31, 9), 1),
]


def main() -> int:
    isa = cpu_info()["isa"]
    assert isa == sys.argv[1], f"this CPU should take {sys.argv[1]} kernels, not {isa}"
    rng = np.random.default_rng(3)
    cases = list(itertools.product(SHAPES, ("float32", "float64"), ("full", "causal", "mask")))
    for (query_shape, key_shape, v_head_dim), dtype, rule in cases:
        query, key = (rng.standard_normal(shape).astype(dtype) for shape in (query_shape, key_shape))
        value = rng.standard_normal((*key_shape[:-1], v_head_dim)).astype(dtype)
        mask = rng.random((query_shape[-2], key_shape[-2])) < 0.7 if rule == "mask" else None
        alignment = "lower_right" if rule == "causal" else None
        problem = Problem(query, key, value, attn_mask=mask, is_causal=rule == "causal", causal_alignment=alignment)
        out, lse = scaled_dot_product_attention(
            query, key, value, mask, is_causal=rule == "causal", causal_alignment=alignment, return_lse=True
        )
        bounds.check(out, problem, lse=lse, isa=isa, label=f"{query_shape} {key_shape} {dtype} {rule}")
    print(f"{isa}: {len(cases)} problems agree with the oracle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
