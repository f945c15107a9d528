"""From multi-head to grouped-query weights.

`pool_heads` pools the heads of one projection; ``gqa_ext.GroupedQueryAttention.from_mha`` a whole module.
"""

from .methods import pool_heads

__all__ = ["pool_heads"]
