"""The works that are measured, and the floors they are held to.

Plain data for attention.py (which runs them) and contenders.py (which builds the calls). A floor is a ratio of rates,
ours over theirs: `{"torch": 1.3}` says at least 1.3 times torch's speed on the same work.
"""

from __future__ import annotations

from dataclasses import dataclass, field

OURS = "gqa_ext"
WIDEST = "gqa_ext, widest ISA"
TORCH = "torch"
ORT = "onnxruntime"
OPENVINO = "openvino"
GGML = "ggml"
"""Where it is built: its floors hold only where it takes part."""
NUMPY = "numpy"
GEMM = "gemm"
READ = "read"

PEERS = (TORCH, ORT, NUMPY)


@dataclass(frozen=True)
class Work:
    """One problem, self-contained: shapes, who takes part, and what is asked of us."""

    name: str
    seq_q: int
    seq_k: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "float32"
    is_causal: bool = False
    """Row i sees key j <= i + seq_k - seq_q (lower right)."""
    unit: str = "FLOP"
    """What the rate counts: FLOP, or B (bytes of K and V read once)."""
    contenders: tuple[str, ...] = (OURS, *PEERS, GEMM)
    floors: dict[str, float] = field(default_factory=dict)
    any_floor: bool = False
    """One floor met is enough."""
    isa: str | None = None
    """gqa_ext is held to this ISA."""
    coretype: str | None = None
    """OpenBLAS is held to this core type (read once, at import: needs a process of its own)."""

    @property
    def live_pairs(self) -> int:
        """Query-key pairs that are not masked, of one head of one sequence."""
        if not self.is_causal:
            return self.seq_q * self.seq_k
        before = self.seq_k - self.seq_q
        return self.seq_q * before + self.seq_q * (self.seq_q + 1) // 2

    @property
    def flops(self) -> int:
        """Two products of 2 * head_dim FLOP for each live pair; softmax is not counted."""
        return 4 * self.batch * self.num_heads * self.head_dim * self.live_pairs

    @property
    def kv_nbytes(self) -> int:
        """Bytes of K and V together."""
        itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]
        return 2 * self.batch * self.num_kv_heads * self.seq_k * self.head_dim * itemsize

    @property
    def amount(self) -> int:
        """What one call gets through, in `unit`."""
        return self.flops if self.unit == "FLOP" else self.kv_nbytes


def _decode(name: str, seq_k: int, num_kv_heads: int, batch: int = 1, read: float = 0.7) -> Work:
    return Work(
        name, 1, seq_k, num_kv_heads=num_kv_heads, batch=batch, unit="B", contenders=(OURS, *PEERS, READ),
        floors={READ: read, TORCH: 1.0, ORT: 1.0},
    )  # fmt: skip


def _half_prefill(dtype: str) -> Work:
    return Work(
        f"{dtype} prefill 2048 causal, 32/8, D=128", 2048, 2048, dtype=dtype, is_causal=True,
        contenders=(OURS, TORCH, OPENVINO, GEMM), floors={GEMM: 0.8, TORCH: 1.3, OPENVINO: 1.2},
    )  # fmt: skip


def _half_decode(
    dtype: str, shape: str, seq_k: int, num_heads: int, floors: dict[str, float], num_kv_heads: int = 8
) -> Work:
    contenders = (OURS, TORCH, READ) if dtype == "bfloat16" else (OURS, TORCH, ORT, GGML, READ)  # float16 only
    return Work(
        f"{dtype} decode {shape}, D=128", 1, seq_k, num_heads, num_kv_heads, dtype=dtype, unit="B",
        contenders=contenders, floors=floors,
    )  # fmt: skip


WORKS = (
    Work("prefill 2048 causal, 32/8, D=128", 2048, 2048, is_causal=True, floors={GEMM: 0.85, TORCH: 1.3, ORT: 1.2}),
    Work("prefill 2048 causal, 32/8, D=64", 2048, 2048, head_dim=64, is_causal=True, floors={GEMM: 0.75, TORCH: 1.3}),
    Work("512 tokens, 32/8, D=128", 512, 512, floors={GEMM: 0.85, TORCH: 1.1}),
    Work("16 x 256 tokens, 8/8, D=64", 256, 256, 8, 8, 64, batch=16, floors={GEMM: 0.7, TORCH: 1.3}),
    Work("float64 prefill 1024 causal, 8/2, D=128", 1024, 1024, 8, 2, dtype="float64", is_causal=True,
         contenders=(OURS, TORCH, NUMPY, GEMM), floors={GEMM: 0.75}),
    Work("16 new rows, 4096 keys, 32/8, D=128", 16, 4096, is_causal=True, floors={GEMM: 0.5}),
    _decode("decode 4k keys, 32/8, D=128", 4096, 8),
    _decode("decode 16k keys, 32/8, D=128", 16384, 8, read=0.85),
    _decode("decode 4k keys, 32/32, D=128", 4096, 32, read=0.9),
    _decode("decode 16k keys, 32/32, D=128", 16384, 32),
    _decode("decode 8 x 2k keys, 32/8, D=128", 2048, 8, batch=8),
    _decode("decode 8 x 2k keys, 32/32, D=128", 2048, 32, batch=8),
    _half_prefill("bfloat16"),
    _half_prefill("float16"),
    _half_decode("float16", "16k keys, 32/8", 16384, 32, {READ: 0.8, TORCH: 3.0, ORT: 2.0, GGML: 2.0}),
    _half_decode("bfloat16", "16k keys, 32/8", 16384, 32, {READ: 0.8, TORCH: 3.0}),
    _half_decode("float16", "4k keys, 64/8", 4096, 64, {TORCH: 3.0, ORT: 1.3, GGML: 1.0}),
    _half_decode("float16", "4k keys, 32/1", 4096, 32, {TORCH: 1.0, ORT: 1.0, GGML: 1.0}, num_kv_heads=1),
    Work("call: one query, one key, 8/2, D=64", 1, 1, 8, 2, 64, contenders=(OURS, *PEERS), floors={TORCH: 1 / 1.5}),
    Work("AVX2 only: prefill 2048 causal, 32/8, D=128", 2048, 2048, is_causal=True, contenders=(OURS, WIDEST, GEMM),
         floors={WIDEST: 0.75, GEMM: 0.75}, any_floor=True, isa="avx2", coretype="Haswell"),
)  # fmt: skip
