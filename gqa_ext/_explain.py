"""Why C said no: the checks of csrc once more, in words.

C answers a bad argument with a status and no text.  The binding then calls the function of the same
name here with the same arguments, and it raises.  Nothing here runs for a call that succeeds, so clarity is all that
counts.  The checks that Python makes itself (_arguments.py and _rules.py) raise in the same way.
"""

from typing import Any, NoReturn

import numpy as np

from . import _core
from ._arguments import as_scale, room
from ._checks import (
    DOUBLE,
    check_array,
    check_dtype,
    check_head_dim,
    check_heads,
    check_lengths,
    check_mask,
    check_out,
    check_rank,
    check_same_precision,
    check_sequence,
    check_spread,
    output_shape,
)
from ._messages import (
    ATTENTION,
    FLOATS,
    ROPE,
    Array,
    brief,
    count,
    fail,
    fits,
    heads,
    kind,
    native,
    shapes,
)
from ._rules import Rules

# ---- attention ----


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    is_causal: Any,
    alignment: Any,
    scale: Any,
    enable_gqa: Any,
    rules: Any,
    out: Any,
    return_lse: Any,
) -> NoReturn:
    """Raise what is wrong with the arguments of ``_core.attention``."""
    if isinstance(rules, Rules) and rules.cached_keys is not None:
        cached_attention(query, key, value, attn_mask, is_causal, scale, rules, out, return_lse)
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_array(ATTENTION, name, array)
        check_dtype(name, array)
    check_same_precision(ATTENTION, query=query, key=key, value=value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_rank(name, array)
    check_head_dim(query, key)
    check_sequence(key, value)
    check_heads(query, key, value, enable_gqa)
    shape = output_shape(query, key, value)
    if attn_mask is not None:
        check_mask(attn_mask, (*shape[:-1], key.shape[-2]))
    if isinstance(scale, float):
        as_scale(ATTENTION, scale, query.dtype)
    if rules is not None:
        check_rules(rules, query, key, shape)
    check_result(out, shape, query, key, value)
    arrays = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "out": out}
    flags = f"{is_causal=}, {alignment=}, {scale=}, {enable_gqa=}, {rules=}, {return_lse=}"
    came = ", ".join(f"{name} is {brief(array)}" for name, array in arrays.items())
    fail(ValueError, ATTENTION, f"{came}; {flags}", "C refuses this and no check here says why", "please report it")


def cached_attention(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: Any, scale: Any, rules: Rules, out: Any, lse: Any
) -> NoReturn:
    """The same for a cache, whose keys are seen as the array that they would be; _cached.py names its call."""
    check_array(ATTENTION, "query", query)
    held = native(key.dtype)
    check_dtype("query", query, among=DOUBLE if held == np.float64 else FLOATS[:-1], why=f", as the cache holds {held}")
    check_rank("query", query)
    _check_against_cache(query, key)
    if rules.block_table is not None and rules.kv_lengths is not None:
        check_lengths("kv_lengths", rules.kv_lengths, (len(rules.block_table),), "keys in its blocks",
                      int(rules.cached_keys or 0), f"(block_table {rules.block_table.shape})")  # fmt: skip
        check_blocks(rules.block_table, rules.kv_lengths, key)
    key, value = cache_as_arrays(key, value, rules.block_table, int(rules.cached_keys or 0))
    plain = rules._replace(cached_keys=None, block_table=None, key_scales=None, value_scales=None)
    attention(query, key, value, attn_mask, is_causal, True, scale, True, plain, out, lse)


def _check_against_cache(query: Array, key: Array) -> None:
    """head_dim and heads are those of keys that the caller does not see."""
    dim, hkv, hq = key.shape[3], key.shape[1], heads(query)
    if query.shape[-1] != dim:
        wanted = f"{dim} was wanted, as the cache's keys have it ({shapes(query=query)})"
        fail(ValueError, ATTENTION, f"query has head_dim {query.shape[-1]}", wanted, f"pass (..., rows, {dim})")
    if hkv == 0 or hq % hkv:
        wanted = f"query heads must be a multiple of the {hkv} key heads of the cache ({shapes(query=query)})"
        fix = f"pass query with {hkv}, {2 * hkv} or another multiple of heads, as (..., heads, rows, head_dim)"
        fail(ValueError, ATTENTION, f"query has {count(hq, 'head')}", wanted, fix)


def cache_as_arrays(key: Array, value: Array, table: Array | None, seq_k: int) -> list[Array]:
    """Arrays (B, Hkv, Sk, D) of the cache's shape and type, float32 for int8, with nothing in them."""
    batch = key.shape[0] if table is None else len(table)
    kinds = [array.dtype if array.dtype != np.int8 else np.dtype(np.float32) for array in (key, value)]
    shapes_of = [(batch, array.shape[1], seq_k, array.shape[3]) for array in (key, value)]
    return [np.broadcast_to(np.zeros((), kind), shape) for kind, shape in zip(kinds, shapes_of, strict=True)]


def check_blocks(table: Array, lengths: Array, blocks: Array) -> None:
    """Entries that a sequence's length makes use of name a block."""
    rows = blocks.shape[2]
    used = np.arange(table.shape[1]) * rows < lengths[:, None]
    bad = np.argwhere(used & ((table < 0) | (table >= len(blocks))))
    if len(bad):
        b, j = bad[0]
        there = f"a block from 0 to {len(blocks) - 1}" if len(blocks) else "one of no blocks"
        wanted = f"{there} was wanted, as sequence {b} has {lengths[b]} keys"
        fix = f"give it {count(-(-int(lengths[b]) // rows), 'block')} of {rows} rows"
        fail(ValueError, ATTENTION, f"block_table[{b}, {j}] is {table[b, j]}", wanted, fix)


def check_result(out: Any, shape: tuple[int, ...], query: Array, key: Array, value: Array) -> None:
    """What is written fits, and fits into memory; the LSE may take more of it than narrow values."""
    if out is not None:
        check_out(out, shape, query)
    fix = f"pass fewer heads, rows or sequences at once ({shapes(query=query, key=key, value=value)})"
    exact = np.float64 if native(query.dtype) == np.float64 else np.float32
    for name, size, dtype in (("out", shape, native(query.dtype)), ("lse", shape[:-1], exact)):
        room(ATTENTION, name, size, dtype, fix)


def check_rules(rules: Any, query: Array, key: Array, shape: tuple[int, ...]) -> None:
    """The arrays that _rules.py made, against the shapes of the others; ``shape`` is the output's."""
    if not isinstance(rules, Rules):
        fail(TypeError, ATTENTION, f"rules is {kind(rules)}", "_rules.Rules was wanted", "pass each rule by its name")
    leading, seq_q, seq_k = shape[:-3], shape[-2], key.shape[-2]
    where = f"({shapes(query=query, key=key)})"
    if rules.alibi_slopes is not None:
        wanted = f"(query heads,) or (..., query heads) was wanted {where}"
        fix = f"pass gqa_ext.get_alibi_slopes({heads(query)}), or one slope for each query head"
        check_spread("alibi_slopes", rules.alibi_slopes, (*leading, heads(query)), wanted, fix)
    for name, lengths, rows, most in (
        ("query_lengths", rules.query_lengths, "query rows", seq_q),
        ("kv_lengths", rules.kv_lengths, "key rows", seq_k),
    ):
        if lengths is not None:
            check_lengths(name, lengths, leading, rows, most, where)
    for name, positions, seq in (
        ("query_positions", rules.query_positions, seq_q),
        ("key_positions", rules.key_positions, seq_k),
    ):
        if positions is not None:
            wanted = f"one position for each row was wanted, broadcasting to {(*leading, seq)} {where}"
            check_spread(name, positions, (*leading, seq), wanted, f"pass {seq} positions, or {(*leading, seq)}")


# ---- the other calls of _core ----


def cache_append(
    keys: Any, values: Any, key_scales: Any, value_scales: Any, table: Any, key: Any, value: Any, lengths: Any,
    counts: Any,
) -> None:  # fmt: skip
    """cache.py and paged.py check all but the dtypes before they call."""
    for name, array in (("key", key), ("value", value)):
        check_array("KVCache.append", name, array)
        check_dtype(name, array, "KVCache.append")
    came = f"key is {brief(key)}, value {brief(value)}, for a cache of {brief(keys)} and {brief(values)}"
    state = f"scales {brief(key_scales)}, {brief(value_scales)}, table {brief(table)}, {lengths=}, {counts=}"
    wanted = "C refuses this and no check here says why"
    fail(ValueError, "KVCache.append", f"{came}; {state}", wanted, "please report it")


def pool_heads(weight: Any, out: Any, axis: Any, num_heads: Any, members: Any, weights: Any) -> None:
    """convert.pool_heads checks before it calls, so this describes a call that went round it."""
    came = f"weight is {brief(weight)} and out {brief(out)} for axis {axis!r} and num_heads {num_heads!r}"
    wanted = (
        "float arrays of one dtype were wanted that differ along axis only, with members (num_kv_heads, k) "
        f"int64 and weights float64 of the same shape or None, not {brief(members)} and {brief(weights)}"
    )
    fail(ValueError, "pool_heads", came, wanted, "call gqa_ext.convert.pool_heads")


def rope(x: Any, positions: Any, frequencies: Any, scale: Any, interleaved: Any, out: Any) -> NoReturn:
    """Raise what is wrong with the arguments of ``_core.rope``."""
    check_array(ROPE, "x", x)
    check_dtype("x", x, ROPE)
    if positions is not None:
        check_array(ROPE, "positions", positions)
        length, batch = x.shape[-2], x.shape[:-3]
        if positions.ndim == 0 or positions.shape[-1] != length or not fits(positions.shape, (*batch, length)):
            wanted = f"({length},) or {(*batch, length)} was wanted: one for each row ({shapes(x=x)})"
            fix = f"pass {length} positions" + (" for each sequence, or one row of them for all" if batch else "")
            fail(ValueError, ROPE, f"positions has shape {positions.shape}", wanted, fix)
    if out is not None:
        check_out(out, x.shape, x, ROPE, "x")
    came = f"x is {brief(x)}, positions {brief(positions)}, frequencies {brief(frequencies)} and out {brief(out)}"
    fail(ValueError, ROPE, f"{came}; {scale=}, {interleaved=}", "C refuses this and no check here says why")


def isa_use(name: Any) -> None:
    """A name that this CPU can run."""
    there = ", ".join(_core.isa_available())
    if not isinstance(name, str):
        fail(TypeError, "use_isa", f"name is {kind(name)}", "a str was wanted", f"pass one of {there}")
    if name not in _core.isa_available():
        wanted = "an instruction set of this CPU was wanted"
        fail(ValueError, "use_isa", f"name is {name!r}", wanted, f"pass one of {there}")


def set_num_threads(number: Any) -> None:
    """A positive int."""
    if isinstance(number, bool) or not isinstance(number, int):
        fail(TypeError, "set_num_threads", f"n is {kind(number)}", "an int was wanted", "pass 1 or more")
    fail(ValueError, "set_num_threads", f"n is {number}", "at least 1 thread was wanted", "pass 1 or more")
