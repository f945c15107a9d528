"""Biases on scores that follow from positions: the slopes of ALiBi."""

import numpy as np

from ._arguments import as_int
from ._messages import Array


def get_alibi_slopes(num_heads: int) -> Array:
    """One slope for each head, as ALiBi sets them (Press et al., arXiv:2108.12409).

    For a power of two n they are the powers 1 to n of 2**(-8 / n). Any other number takes those of the next
    smaller power of two, then every other one of twice that power, as the paper's code, BLOOM and transformers do.

    Parameters
    ----------
    num_heads : int
        Query heads, at least 1.

    Returns
    -------
    ndarray (num_heads,), float64
        For ``scaled_dot_product_attention(..., alibi_slopes=...)``, where scores lose slope * abs(p_i - p_j).

    Raises
    ------
    ValueError
        num_heads is below 1.
    TypeError
        num_heads is no int.

    Examples
    --------
    >>> get_alibi_slopes(8)[:3]
    array([0.5  , 0.25 , 0.125])
    >>> get_alibi_slopes(6)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625, 0.5       ,
           0.125     ])
    """
    count = as_int("get_alibi_slopes", "num_heads", num_heads, 1)
    power = 1 << (count.bit_length() - 1)  # the largest power of two up to count
    more = _powers(2 * power)[::2]
    return np.concatenate([_powers(power), more[: count - power]])


def _powers(count: int) -> Array:
    """The powers 1 to count of 2**(-8 / count)."""
    exponents: Array = np.arange(1, count + 1) * (-8 / count)
    return np.exp2(exponents)
