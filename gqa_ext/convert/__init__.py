"""From multi-head to grouped-query weights.

`pool_heads` pools the heads of one projection; `convert_attention` one layer's arrays; `convert_checkpoint` a model on
disk, which `inspect_checkpoint` describes and `verify_checkpoint` proves; ``GroupedQueryAttention.from_mha`` a module.
"""

from .architectures import Layout
from .attention import AttentionConversion, convert_attention
from .checkpoint import convert_checkpoint
from .inspect import inspect_checkpoint
from .methods import pool_heads
from .report import ConversionReport
from .verify import Verification, verify_checkpoint

__all__ = [
    "AttentionConversion",
    "ConversionReport",
    "Layout",
    "Verification",
    "convert_attention",
    "convert_checkpoint",
    "inspect_checkpoint",
    "pool_heads",
    "verify_checkpoint",
]
