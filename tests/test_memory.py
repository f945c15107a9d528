"""No temporary grows with seq_q x seq_k, and nothing is copied whole.

Each call runs in a process of its own, which reports by how much its peak resident size grew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

# What the pool's scratch, two threads' stacks and the allocator may take, in MB.
ROOM = 24

SCRIPT = """
import numpy as np, gqa_ext
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)
small = ones(1, 1, 300, 64)
gqa_ext.scaled_dot_product_attention(small, small, small)  # threads and scratch exist from here on
{setup}
out = np.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)
out[...] = 3
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident
before = peak()
gqa_ext.scaled_dot_product_attention(query, key, value, {rules} out=out)
print(peak() - before)
assert (out == 1).all()
"""

CASES = {
    "16384 x 16384, whose scores are 1 GB": ("query = key = value = ones(1, 1, 16384, 64)", ""),
    "the same, causal": ("query = key = value = ones(1, 1, 16384, 64)", "is_causal=True,"),
    "a bool mask of 67 MB": (
        "query = key = value = ones(1, 1, 8192, 16); mask = ones(8192, 8192, dtype=bool)",
        "attn_mask=mask,",
    ),
    "a broadcast float mask": (
        "query = key = value = ones(1, 1, 8192, 16); mask = np.broadcast_to(ones(8192) * 2, (8192, 8192))",
        "attn_mask=mask,",
    ),
    "one row over 128 MB of keys": ("query = ones(1, 8, 1, 64); key = value = ones(1, 2, 262144, 64)", ""),
    "keys in the other byte order": (
        "query = ones(1, 8, 1, 64); key = value = ones(1, 2, 262144, 64, dtype=np.dtype('f4').newbyteorder())",
        "",
    ),
    "keys with a stride": (
        "query = ones(1, 8, 60, 64); key = value = ones(1, 131072, 2, 128)[..., ::2].swapaxes(1, 2)",
        "",
    ),
    "a query of 64 MB": ("query = ones(1, 64, 4096, 64); key = value = ones(1, 2, 8, 64)", ""),
    "float64": ("query = key = value = ones(1, 1, 8192, 64, dtype=float)", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_peak(name: str) -> None:
    setup, rules = CASES[name]
    command = [sys.executable, "-c", SCRIPT.format(setup=setup, rules=rules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < ROOM, f"peak grew by {float(done.stdout):.1f} MB"
