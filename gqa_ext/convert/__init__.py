"""From multi-head to grouped-query weights.

`pool_heads` pools the heads of one projection; ``gqa_ext.GroupedQueryAttention.from_mha`` a whole module;
`convert_checkpoint` a model on disk.
"""

from .checkpoint import convert_checkpoint
from .methods import pool_heads
from .report import ConversionReport

__all__ = ["ConversionReport", "convert_checkpoint", "pool_heads"]
