"""Grouped-query attention for NumPy on the CPU.

>>> import numpy as np, gqa_ext
>>> query, key, value = np.ones((8, 5, 64)), np.ones((2, 5, 64)), np.ones((2, 5, 64))
>>> gqa_ext.scaled_dot_product_attention(query, key, value, is_causal=True).shape
(8, 5, 64)
"""

from ._built import use_built_package

use_built_package(__path__)

from . import convert, testing  # noqa: E402
from ._runtime import cpu_info, get_num_threads, set_num_threads  # noqa: E402
from .attention import kv_cache_nbytes, repeat_kv, scaled_dot_product_attention  # noqa: E402
from .bias import get_alibi_slopes  # noqa: E402
from .cache import KVCache  # noqa: E402
from .merge import merge_attention  # noqa: E402
from .module import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention  # noqa: E402
from .packed import varlen_attention  # noqa: E402
from .paged import PagedKVCache, paged_attention  # noqa: E402
from .rope import RotaryEmbedding  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "GroupedQueryAttention",
    "KVCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "PagedKVCache",
    "RotaryEmbedding",
    "convert",
    "cpu_info",
    "get_alibi_slopes",
    "get_num_threads",
    "kv_cache_nbytes",
    "merge_attention",
    "paged_attention",
    "repeat_kv",
    "scaled_dot_product_attention",
    "set_num_threads",
    "testing",
    "varlen_attention",
]
