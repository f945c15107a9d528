# Private: called by attention.py, convert and testing.py with exact ndarrays.
from typing import Any

from numpy.typing import NDArray

from ._rules import Rules

def attention(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    attn_mask: NDArray[Any] | None,
    is_causal: bool,
    lower_right: bool,
    scale: float | None,
    enable_gqa: bool,
    rules: Rules | None,
    out: NDArray[Any] | None,
    return_lse: bool,
    /,
) -> Any: ...
def cache_append(
    keys: NDArray[Any],
    values: NDArray[Any],
    key_scales: NDArray[Any] | None,
    value_scales: NDArray[Any] | None,
    block_table: NDArray[Any] | None,
    new_keys: NDArray[Any],
    new_values: NDArray[Any],
    lengths: NDArray[Any],
    counts: NDArray[Any],
    /,
) -> None: ...
def pool_heads(
    weight: NDArray[Any],
    out: NDArray[Any],
    axis: int,
    num_heads: int,
    members: NDArray[Any],
    weights: NDArray[Any] | None,
    /,
) -> NDArray[Any]: ...
def rope(
    x: NDArray[Any],
    positions: NDArray[Any] | None,
    frequencies: NDArray[Any],
    scale: float,
    interleaved: bool,
    out: NDArray[Any] | None,
    /,
) -> NDArray[Any]: ...
def isa_available() -> tuple[str, ...]: ...
def isa_current() -> str: ...
def isa_use(name: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(number: int, /) -> None: ...
