"""Why C said no: the checks of csrc once more, in words.

C answers a bad argument with a status and no text.  The binding then calls the function of the same
name here with the same arguments, and it raises.  Nothing here runs for an attention call that succeeds,
so clarity is all that counts; single checks serve packed and paged calls and the layer, before they begin.
The checks that Python makes itself (_arguments.py and _rules.py) raise in the same way.
"""

from typing import Any, NoReturn

import numpy as np

from . import _core
from ._arguments import as_scale, room
from ._messages import (
    ATTENTION,
    FLOATS,
    ROPE,
    Array,
    brief,
    count,
    divisors,
    fail,
    fits,
    heads,
    kind,
    native,
    one_of,
    shapes,
)
from ._rules import Rules

DOUBLE = FLOATS[-1:]

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
    if rules.block_table is not None and rules.kv_lengths is not None:
        check_lengths("kv_lengths", rules.kv_lengths, (len(rules.block_table),), "keys in its blocks",
                      int(rules.cached_keys or 0), f"(block_table {rules.block_table.shape})")  # fmt: skip
        check_blocks(rules.block_table, rules.kv_lengths, key)
    key, value = cache_as_arrays(key, value, rules.block_table, int(rules.cached_keys or 0))
    plain = rules._replace(cached_keys=None, block_table=None, key_scales=None, value_scales=None)
    attention(query, key, value, attn_mask, is_causal, True, scale, True, plain, out, lse)


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
        wanted = f"a block from 0 to {len(blocks) - 1} was wanted, as sequence {b} has {lengths[b]} keys"
        fix = f"give it {count(-(-int(lengths[b]) // rows), 'block')} of {rows} rows"
        fail(ValueError, ATTENTION, f"block_table[{b}, {j}] is {table[b, j]}", wanted, fix)


def check_array(call: str, name: str, array: Any) -> None:
    """Only exact ndarrays go to C; the callers convert everything else first."""
    if type(array) is not np.ndarray:
        fail(TypeError, call, f"{name} is {kind(array)}", "an ndarray was wanted", f"pass np.asarray({name})")


def check_dtype(
    name: str, array: Array, call: str = ATTENTION, among: tuple[np.dtype[Any], ...] = FLOATS, why: str = ""
) -> None:
    """One of the four float dtypes, or of fewer and why."""
    dtype = native(array.dtype)
    if dtype in among:
        return
    if dtype.kind == "c":
        fix = f"it is not defined for complex numbers; pass {name}.real or {name}.imag"
    elif dtype.kind in "?biuf" or dtype in FLOATS:
        fix = f"pass {name}.astype(np.{'float64' if among == DOUBLE else 'float32'})"
    else:
        fix = "pass an array of floating-point numbers"
    fail(TypeError, call, f"{name} has dtype {dtype}", f"{one_of(among)} was wanted{why}", fix)


def check_same_precision(call: str, **arrays: Array) -> None:
    """float64 goes only with float64, the others in any mix."""
    types = {name: native(array.dtype) for name, array in arrays.items()}
    odd = [name for name, dtype in types.items() if dtype != np.float64]
    if 0 < len(odd) < len(types):
        came = ", ".join(f"{name} is {dtype}" for name, dtype in types.items())
        fix = f"pass {odd[0]}.astype(np.float64), or {'both' if len(types) == 2 else 'all three'} as float32"
        fail(TypeError, call, came, "float64 goes only with float64", fix)


def check_rank(name: str, array: Array) -> None:
    """(S, D), (H, S, D) or (..., H, S, D)."""
    if array.ndim < 2:
        fix = f"pass {name}[None, :] for a single row" if array.ndim else "pass an array of rows"
        wanted = f"at least the dimensions (sequence, head_dim) were wanted ({shapes(**{name: array})})"
        fail(ValueError, ATTENTION, f"{name} has {count(array.ndim, 'dimension')}", wanted, fix)


def check_head_dim(query: Array, key: Array) -> None:
    """query and key share head_dim; value's may differ."""
    q_dim, k_dim = query.shape[-1], key.shape[-1]
    where = shapes(query=query, key=key)
    if q_dim != k_dim:
        wanted = f"query and key must have the same last dimension ({where})"
        fix = "slice or project one of them"
        if key.shape[-2] == q_dim:
            fix = "key is (..., sequence, head_dim), not transposed; pass key.swapaxes(-1, -2)"
        fail(ValueError, ATTENTION, f"key has head_dim {k_dim} but query has {q_dim}", wanted, fix)
    if q_dim == 0:
        wanted = f"at least 1 was wanted ({where})"
        fail(ValueError, ATTENTION, "query and key have head_dim 0", wanted, "pass arrays with a last dimension")


def check_sequence(key: Array, value: Array) -> None:
    """key and value are one sequence."""
    k_len, v_len = key.shape[-2], value.shape[-2]
    if k_len != v_len:
        wanted = f"each key needs its value ({shapes(key=key, value=value)})"
        fix = f"pass the same {min(k_len, v_len)} positions of both, as (..., sequence, head_dim)"
        fail(ValueError, ATTENTION, f"value has {count(v_len, 'row')} but key has {k_len}", wanted, fix)


def check_heads(query: Array, key: Array, value: Array, enable_gqa: bool) -> None:
    """Hq % Hkv == 0, or equal heads where grouping is switched off."""
    hq, hk, hv = heads(query), heads(key), heads(value)
    where = shapes(query=query, key=key)
    if hk != hv:
        wanted = f"key and value must have the same number of heads ({shapes(key=key, value=value)})"
        fix = "pass them as (..., heads, sequence, head_dim) with equal heads"
        fail(ValueError, ATTENTION, f"value has {count(hv, 'head')} but key has {hk}", wanted, fix)
    if not enable_gqa and hq != hk:
        wanted = f"without grouping the heads must be equal, or 1 ({where})"
        came = f"key has {count(hk, 'head')} but query has {hq} and enable_gqa is False"
        fail(ValueError, ATTENTION, came, wanted, "pass enable_gqa=True")
    check_ratio(hq, hk, where)


def check_ratio(q_heads: int, k_heads: int, where: str, call: str = ATTENTION) -> None:
    """Each key head is read by equally many query heads."""
    if q_heads != k_heads and (k_heads == 0 or q_heads % k_heads):
        came = f"key has {count(k_heads, 'head')} but query has {q_heads}"
        wanted = f"query heads must be a multiple of key heads ({where})"
        fail(ValueError, call, came, wanted, f"pass key and value with one of {divisors(q_heads)} heads")


def output_shape(query: Array, key: Array, value: Array) -> tuple[int, ...]:
    """(..., Hq, Sq, Dv) over the broadcast leading dimensions."""
    try:
        leading = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except ValueError:
        came = f"query has batch dimensions {query.shape[:-3]}, key {key.shape[:-3]} and value {value.shape[:-3]}"
        where = shapes(query=query, key=key, value=value)
        wanted = f"the dimensions before (heads, sequence, head_dim) must be equal or 1 ({where})"
        fail(ValueError, ATTENTION, came, wanted, "give all three the same batch, or 1 where one is shared")
    most = max(query.ndim, key.ndim, value.ndim)
    inner = (heads(query),) if most > 2 else ()
    return (*leading, *inner, query.shape[-2], value.shape[-1])


def check_mask(mask: Any, target: tuple[int, ...], call: str = ATTENTION) -> None:
    """bool or float, broadcasting to (..., Hq, Sq, Sk)."""
    check_array(call, "attn_mask", mask)
    dtype = native(mask.dtype)
    if dtype != np.bool_ and dtype not in FLOATS:
        fix = "pass attn_mask.astype(bool), True where a key may be seen"
        if dtype.kind not in "iu":
            fix = "pass bool (True where a key may be seen) or float32 (added to the scores)"
        wanted = f"bool, {one_of(FLOATS)} was wanted"
        fail(TypeError, call, f"attn_mask has dtype {dtype}", wanted, fix)
    if not fits(mask.shape, target):
        wanted = f"it must broadcast to (..., query heads, query rows, key rows) {target} and not widen it"
        fail(ValueError, call, f"attn_mask has shape {mask.shape}", wanted, mask_fix(mask, target))


def mask_fix(mask: Array, target: tuple[int, ...]) -> str:
    """The indexing that makes the mask fit, if a usual one does."""
    for index, text in (
        ((slice(None), None), "attn_mask[:, None]"),
        ((slice(None), None, None), "attn_mask[:, None, None]"),
    ):
        if mask.ndim + len(index) - 1 == len(target) and fits(mask[index].shape, target):
            return f"pass {text}"
    if mask.ndim > 1 and fits(mask.swapaxes(-1, -2).shape, target):
        return "pass attn_mask.swapaxes(-1, -2), rows are queries"
    return "pass a mask of that shape, or with 1 in any place"


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


def check_spread(
    name: str, array: Array, target: tuple[int, ...], wanted: str, fix: str, call: str = ATTENTION
) -> None:
    """Broadcasts to the target without widening it."""
    if not fits(array.shape, target):
        fail(ValueError, call, f"{name} has shape {array.shape}", wanted, fix)


def check_lengths(
    name: str, lengths: Array, leading: tuple[int, ...], rows: str, most: int, where: str, call: str = ATTENTION
) -> None:
    """One for each sequence, and none longer than the array."""
    wanted = f"one length for each sequence was wanted, broadcasting to {leading} {where}"
    fix = f"pass shape {leading}" if leading else "pass one int"
    check_spread(name, lengths, leading, wanted, fix, call)
    bad = np.argwhere((lengths < 0) | (lengths > most))
    if len(bad):
        at = f"[{', '.join(map(str, bad[0]))}]" if lengths.ndim else ""
        came = f"{name}{at} is {lengths[tuple(bad[0])]}"
        wanted = f"from 0 to the number of {rows}, {most}, was wanted {where}"
        fail(ValueError, call, came, wanted, f"pass {name}.clip(0, {most}), or longer arrays")


def check_out(out: Any, shape: tuple[int, ...], query: Array, call: str = ATTENTION, name: str = "query") -> None:
    """Exactly the result's shape and dtype, and writable."""
    dtype = native(query.dtype)
    fix = f"pass np.empty({shape}, np.{dtype})"
    check_array(call, "out", out)
    if out.shape != shape:
        fail(ValueError, call, f"out has shape {out.shape}", f"{shape} was wanted", fix)
    if native(out.dtype) != dtype:
        fail(TypeError, call, f"out has dtype {out.dtype}", f"{name}'s dtype {dtype} was wanted", fix)
    if not out.flags.writeable:
        fail(ValueError, call, "out is read-only", "an array that can be written was wanted", fix)


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
