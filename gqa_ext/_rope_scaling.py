"""Hugging Face's rope dict, read: the frequencies of each pair, for every type that it knows.

The formulas are those of transformers.modeling_rope_utils, in float64 where those are in float32: linear
(kaiokendev), dynamic (NTK-aware, bloc97 and emozilla), yarn (arXiv:2309.00071), longrope (arXiv:2402.13753) and
llama3 (Llama 3.1). Called by rope.py, once for each RotaryEmbedding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._arguments import as_flag, as_int, as_real
from ._messages import Array, fail, kind

CALL = "RotaryEmbedding"

# What each type needs and may have, beside COMMON.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
SCALED = {key for needed, optional in KEYS.values() for key in needed + optional}
IDLE = {"finetuned"}  # in published dicts, and read by nobody


class Frequencies(NamedTuple):
    """What a position is multiplied by to give the angle of each pair, and how long a turned pair becomes."""

    table: Array  # (1, pairs) float64
    scale: float


ByLength: TypeAlias = Callable[[int], Frequencies]  # of the largest position + 1


class Settings(NamedTuple):
    """The constructor's arguments and the dict as one."""

    kind: str
    base: float
    dim: int  # odd where partial_rotary_factor says so: the last pair is whole, as in transformers
    given: dict[str, Any]  # without keys that are None

    @property
    def pairs(self) -> int:
        """Of elements that are turned."""
        return (self.dim + 1) // 2

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, which every number in these dicts must be."""
        if default is not None and key not in self.given:
            return default
        fix = f"pass the {key} of the model's config.json"
        number = as_real(CALL, f"scaling[{key!r}]", self.given[key], fix)
        if not (math.isfinite(number) and number > 0):
            fail(ValueError, CALL, f"scaling[{key!r}] is {number}", "a finite number above 0 was wanted", fix)
        return number

    def whole(self, key: str) -> int:
        """A number of positions, of which a sequence has two."""
        return as_int(CALL, f"scaling[{key!r}]", self.given[key], 2)

    def factors(self, key: str) -> Array:
        """One number above 0 for each pair."""
        wanted, fix = f"{self.pairs} numbers above 0 were wanted, one for each pair", "pass it as config.json has it"
        try:
            numbers = np.asarray(self.given[key], np.float64)
        except (TypeError, ValueError):
            fail(TypeError, CALL, f"scaling[{key!r}] is {kind(self.given[key])}", wanted, fix)
        if numbers.shape != (self.pairs,):
            fail(ValueError, CALL, f"scaling[{key!r}] has shape {numbers.shape}", wanted, fix)
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            fail(ValueError, CALL, f"scaling[{key!r}] has {numbers.min()}", wanted, fix)
        return numbers


def read_settings(head_dim: int, base: Any, rotary_dim: Any, scaling: Any, max_position_embeddings: Any) -> Settings:
    """Check everything that is known before a call; ValueError for what is missing or contradicts itself."""
    given = {} if scaling is None else _flat(scaling)
    if max_position_embeddings is not None:
        number = as_int(CALL, "max_position_embeddings", max_position_embeddings, 1)
        _agree("max_position_embeddings", number, given)
        given["max_position_embeddings"] = number
    name = _rope_type(given)
    if name in ("yarn", "longrope", "llama3") and "max_position_embeddings" in given:  # as transformers does
        given.setdefault("original_max_position_embeddings", given["max_position_embeddings"])
    settings = Settings(name, _base(base, given), _rotary_dim(head_dim, rotary_dim, given), given)
    missing = [key for key in KEYS[name][0] if key not in given]
    if missing == ["factor"] and name == "yarn" and "max_position_embeddings" in given:  # as DeepSeek's
        missing = []
    if missing:
        where = "pass max_position_embeddings=" if missing == ["max_position_embeddings"] else "add what is missing"
        fail(ValueError, CALL, f"scaling lacks {', '.join(missing)}", f"rope_type {name!r} needs it", where)
    return settings


def _flat(scaling: Any) -> dict[str, Any]:
    """The dict without what is None; every key is one that some type has."""
    if not isinstance(scaling, Mapping):
        wanted = "Hugging Face's rope dict or None was wanted"
        fix = "pass config.rope_parameters, or rope_scaling of an older config.json"
        fail(TypeError, CALL, f"scaling is {kind(scaling)}", wanted, fix)
    nested = [str(key) for key, setting in scaling.items() if isinstance(setting, Mapping)]
    if nested:
        wanted = "a flat dict was wanted: layers of one type share one RotaryEmbedding"
        came = f"scaling is nested per layer type ({', '.join(map(str, scaling))})"
        fail(ValueError, CALL, came, wanted, f"pass scaling[{nested[0]!r}] for layers of that type")
    unknown = [str(key) for key in scaling if key not in {*COMMON, *SCALED, *IDLE}]
    if unknown:
        wanted = f"known are {', '.join([*COMMON, *sorted(SCALED - {*COMMON})])}"
        fix = "leave out what does not change the rotation; what does is not implemented"
        fail(ValueError, CALL, f"scaling has {', '.join(unknown)}", wanted, fix)
    return {key: setting for key, setting in scaling.items() if setting is not None}


def _rope_type(given: dict[str, Any]) -> str:
    """One of KEYS."""
    names = [given[key] for key in ("rope_type", "type") if key in given]
    if len(names) == 2 and names[0] != names[1]:
        came = f"scaling has rope_type {names[0]!r} and type {names[1]!r}"
        fail(ValueError, CALL, came, "one of them was wanted, or the same twice", "leave out the older name, type")
    known = ", ".join(KEYS)
    if not names:
        scaled = sorted(SCALED & given.keys() - {*COMMON})
        if scaled:
            wanted = f"a rope_type was wanted beside {', '.join(scaled)}"
            fail(ValueError, CALL, "scaling lacks rope_type", wanted, f"add one of {known}")
        return "default"
    if not isinstance(names[0], str):
        fail(TypeError, CALL, f"scaling['rope_type'] is {kind(names[0])}", "a str was wanted", f"pass one of {known}")
    if names[0] not in KEYS:
        fail(ValueError, CALL, f"scaling has rope_type {names[0]!r:.40}", f"known are {known}", "pass one of these")
    return names[0]


def _agree(name: str, number: float, given: Mapping[str, Any], key: str = "") -> None:
    """An argument and the dict's key of the same meaning."""
    key = key or name
    if key in given and given[key] != number:
        came = f"{name} is {number} and scaling has {key} {given[key]!r:.40}"
        fail(ValueError, CALL, came, "one of them was wanted, or the same twice", f"leave {name} out")


def _base(base: Any, given: Mapping[str, Any]) -> float:
    """The argument, the dict's rope_theta, or 10000."""
    fix = "pass the rope_theta of the model's config.json"
    name, thing = ("base", base) if base is not None else ("scaling['rope_theta']", given.get("rope_theta", 10000.0))
    number = as_real(CALL, name, thing, fix)
    if not (math.isfinite(number) and number > 0):
        fail(ValueError, CALL, f"{name} is {number}", "a finite number above 0 was wanted", fix)
    _agree("base", number, given, "rope_theta")
    return number


def _rotary_dim(head_dim: int, rotary_dim: Any, given: Mapping[str, Any]) -> int:
    """The argument, the dict's share of head_dim, or all of it."""
    share = _share(head_dim, given)
    dim = turned = head_dim if share is None else share
    came = f"head_dim is {dim}" if share is None else f"scaling['partial_rotary_factor'] gives {dim}"
    if share is not None:
        turned += share % 2  # as in transformers: the last pair is whole
    if rotary_dim is not None:
        asked = as_int(CALL, "rotary_dim", rotary_dim, 2)
        if share is not None and asked not in (share, turned):
            name = "rotary_dim" if _fits(turned, head_dim) else "partial_rotary_factor"
            wanted = "one of them was wanted, or the same twice"
            fail(ValueError, CALL, f"rotary_dim is {asked} and {came}", wanted, f"leave {name} out")
        if share is None or asked != turned:
            dim, turned, came = asked, asked, f"rotary_dim is {asked}"
    if not _fits(turned, head_dim):
        near = " or ".join(str(even) for even in range(dim - 1, dim + 3) if _fits(even, head_dim))
        fix = f"pass rotary_dim={near or head_dim - head_dim % 2}"
        fix += "" if share is None else ", and leave partial_rotary_factor out"
        fail(ValueError, CALL, came, f"an even number from 2 to head_dim {head_dim} was wanted", fix)
    return dim


def _share(head_dim: int, given: Mapping[str, Any]) -> int | None:
    """Elements by partial_rotary_factor, or None."""
    if "partial_rotary_factor" not in given:
        return None
    name = "scaling['partial_rotary_factor']"
    factor = as_real(CALL, name, given["partial_rotary_factor"], "pass a number up to 1.0")
    if not 0 < factor <= 1:
        fail(ValueError, CALL, f"{name} is {factor}", "a number above 0 and up to 1 was wanted", "pass 1.0 for all")
    return int(head_dim * factor)


def _fits(dim: int, head_dim: int) -> bool:
    """Whether so many elements of a head can be turned."""
    return dim % 2 == 0 and 2 <= dim <= head_dim


# ---- the types ----


def frequencies(settings: Settings) -> Frequencies | ByLength:
    """For the type at hand, once for all or by the length of the sequence."""
    return TYPES[settings.kind](settings)


def _plain(base: float, dim: int) -> Array:
    """base ** (-2 i / dim) of pair i."""
    try:
        doubled = np.arange(0, dim, 2)
    except (MemoryError, ValueError, OverflowError):  # the latter two beyond what can be addressed
        wanted = "a table of frequencies that memory can hold was wanted"
        fail(MemoryError, CALL, f"rotary_dim is {dim}", wanted, "pass a smaller head_dim or rotary_dim")
    with np.errstate(over="ignore"):
        return np.asarray(1.0 / base ** (doubled / dim))


def _as_table(numbers: Array, scale: float = 1.0) -> Frequencies:
    return Frequencies(np.ascontiguousarray(numbers[None], np.float64), scale)


def _default(s: Settings) -> Frequencies:
    return _as_table(_plain(s.base, s.dim))


def _linear(s: Settings) -> Frequencies:
    return _as_table(_plain(s.base, s.dim) / s.number("factor"))


def _dynamic(s: Settings) -> ByLength:
    """The base grows with the sequence, once that is longer than in training."""
    factor, trained = s.number("factor"), s.whole("max_position_embeddings")
    if s.dim == 2:
        came = "rotary_dim is 2 beside rope_type 'dynamic'"
        fail(ValueError, CALL, came, "at least 4 was wanted: one pair has no room for it", "pass rotary_dim=4 or more")
    short = _default(s)

    def by_length(length: int) -> Frequencies:
        if length <= trained:
            return short
        growth = (factor * length / trained - (factor - 1)) ** (s.dim / (s.dim - 2))
        return _as_table(_plain(s.base * growth, s.dim))

    return by_length


def _yarn(s: Settings) -> Frequencies:
    """Fast pairs stay, slow ones are interpolated, and a ramp lies between them."""
    trained = s.whole("original_max_position_embeddings")
    factor = s.number("factor") if "factor" in s.given else s.whole("max_position_embeddings") / trained
    if s.base == 1:
        fail(
            ValueError, CALL, "base is 1 beside rope_type 'yarn'", "pairs of different speed were wanted", "pass base="
        )
    truncate = as_flag(CALL, "scaling['truncate']", s.given.get("truncate", True))

    def pair_that_turns(times: float) -> float:
        """In the length of training; pairs are counted as if by half."""
        return s.dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(s.base))

    fast = s.number("beta_fast") if s.given.get("beta_fast") else 32.0  # as transformers, which takes 0 for none
    slow = s.number("beta_slow") if s.given.get("beta_slow") else 1.0
    low, high = pair_that_turns(fast), pair_that_turns(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, s.dim - 1)
    high += 0.001 if low == high else 0  # as transformers does, against a division by 0
    ramp = ((np.arange(s.pairs) - low) / (high - low)).clip(0, 1)
    plain = _plain(s.base, s.dim)
    return _as_table(plain / factor * ramp + plain * (1 - ramp), _yarn_scale(s, factor))


def _yarn_scale(s: Settings, factor: float) -> float:
    """attention_factor, or what the paper and DeepSeek make of the factor."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in s.given:
        return s.number("attention_factor")
    if s.given.get("mscale") and s.given.get("mscale_all_dim"):  # 0 is off
        return mscale(s.number("mscale")) / mscale(s.number("mscale_all_dim"))
    return mscale(1.0)


def _longrope(s: Settings) -> ByLength:
    """Two tables of factors: for sequences up to the length of training, and for longer ones."""
    trained = s.whole("original_max_position_embeddings")
    scale = s.number("attention_factor", 1.0)
    if "attention_factor" not in s.given:
        if "factor" not in s.given and "max_position_embeddings" not in s.given:
            fix = "pass max_position_embeddings="
            fail(ValueError, CALL, "scaling lacks factor", "rope_type 'longrope' needs it or attention_factor", fix)
        factor = s.number("factor") if "factor" in s.given else s.whole("max_position_embeddings") / trained
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    plain = _plain(s.base, s.dim)
    short = _as_table(plain / s.factors("short_factor"), scale)
    long = _as_table(plain / s.factors("long_factor"), scale)
    return lambda length: long if length > trained else short


def _llama3(s: Settings) -> Frequencies:
    """Long waves are divided by the factor, short ones stay, and those between are mixed."""
    factor, low, high = (s.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        came = f"scaling has high_freq_factor {high} and low_freq_factor {low}"
        fail(ValueError, CALL, came, "a larger high_freq_factor was wanted", "pass both as config.json has them")
    plain = _plain(s.base, s.dim)
    turns = s.whole("original_max_position_embeddings") * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clip(0, 1)
    return _as_table((1 - share) * plain / factor + share * plain)


TYPES: dict[str, Callable[[Settings], Frequencies | ByLength]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
