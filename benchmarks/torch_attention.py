"""torch's scaled_dot_product_attention in every form that means the same; the fastest counts. Used by contenders.py.

All forms read the caller's arrays in place; none repeats K or V outside of torch. `enable_gqa` is the documented one.
`expand` gives torch each group of heads as one sequence whose heads share K and V through a stride of zero. `rows`
(one query row only) gives a group's heads as rows over one head of K and V, so that torch reads these once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from timing import best_of
from torch.nn.functional import scaled_dot_product_attention
from works import Work

Array = NDArray[Any]
Tensor = torch.Tensor
Call = Callable[[int], Tensor]


def _forms(work: Work, sets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Call]:
    batch, heads, kv_heads, seq_q, seq_k = work.batch, work.num_heads, work.num_kv_heads, work.seq_q, work.seq_k
    group = heads // kv_heads
    square = work.is_causal and seq_q == seq_k
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool).tril(seq_k - seq_q) if work.is_causal and not square else None

    def enable_gqa(i: int) -> Tensor:
        q, k, v = sets[i % len(sets)]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)

    def expand(i: int) -> Tensor:
        q, k, v = sets[i % len(sets)]
        shared_k, shared_v = (x.view(batch * kv_heads, 1, seq_k, -1).expand(-1, group, -1, -1) for x in (k, v))
        grouped = q.view(batch * kv_heads, group, seq_q, -1)
        return scaled_dot_product_attention(grouped, shared_k, shared_v, attn_mask=mask, is_causal=square).view(q.shape)

    def rows(i: int) -> Tensor:
        q, k, v = sets[i % len(sets)]
        return scaled_dot_product_attention(q.view(batch, kv_heads, group, -1), k, v).view(q.shape)

    forms: dict[str, Call] = {"enable_gqa": enable_gqa}
    if group > 1:
        forms["expand"] = expand
        if seq_q == 1:
            forms["rows"] = rows
    return forms


def _tensor(array: Array) -> Tensor:
    """The same memory; bfloat16, which from_numpy does not know, by its bits."""
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def build(work: Work, sets: Sequence[tuple[Array, Array, Array]], threads: int) -> tuple[Call, str]:
    """The fastest form's call, which returns a tensor (B, H, S, D), and the form's name."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    forms = _forms(work, [(_tensor(q), _tensor(k), _tensor(v)) for q, k, v in sets])
    tries = 4 if work.flops > 1e9 else 20
    name = min(forms, key=lambda form: best_of(forms[form], tries))
    return forms[name], name
