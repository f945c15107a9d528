"""From multi-head to grouped-query weights.

`pool_heads` pools the heads of one projection; `convert_attention` one layer's arrays; `convert_checkpoint` a model on
disk; ``gqa_ext.GroupedQueryAttention.from_mha`` a module.
"""

from .architectures import Layout
from .attention import AttentionConversion, convert_attention
from .checkpoint import convert_checkpoint
from .methods import pool_heads
from .report import ConversionReport

__all__ = [
    "AttentionConversion",
    "ConversionReport",
    "Layout",
    "convert_attention",
    "convert_checkpoint",
    "pool_heads",
]
