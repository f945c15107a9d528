"""Whether a converted checkpoint keeps every promise, from the two folders alone.

The plan is found again from the source and the shapes and bytes of the result; then each tensor is derived anew and
compared byte for byte, with headers, index, config and companions. Memory is bounded as in a conversion, but for the
logits. Called by the command line and by users.
"""

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, plan_checkpoint, tensor_part
from .header import Header, parse_header, read_header
from .layouts import read_model
from .logits import compare_logits
from .methods import METHODS
from .parts import read_exactly
from .source import Shard, Source, open_source

__all__ = ["Verification", "verify_checkpoint"]

CALL = "verify_checkpoint"
_CHUNK = 1 << 20
_SAMPLE, _SAMPLES = 1 << 16, 32  # bytes and number of stretches that tell plans apart
_MOST = 20  # faults of one file that are named


@dataclass
class Verification:
    """What :func:`verify_checkpoint` found.

    Attributes
    ----------
    source, destination : str
    method, output : str
        As found, or as given.
    num_kv_heads : list of int
        After pooling, of each layer.
    derived, copied : int
        Tensors that were derived anew, and those that were compared with the source's bytes.
    faults : list of str
        Broken promises; each opens with the file.
    logits : dict or None
        Largest differences of logits; None where the models were not run.
    note : str
        Why they were not.
    """

    source: str
    destination: str
    method: str
    output: str
    num_kv_heads: list[int]
    derived: int = 0
    copied: int = 0
    faults: list[str] = field(default_factory=list)
    logits: dict[str, float] | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """No promise is broken."""
        return not self.faults


def verify_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    method: str | None = None,
    groups: Any = None,
    layers: Any = None,
    layout: Any = None,
    num_heads: int | None = None,
    logits: bool = True,
) -> Verification:
    """Prove that `dst` is what :func:`convert_checkpoint` makes of `src`.

    Parameters
    ----------
    src, dst : str or path-like
        The source, and the folder that it was converted to.
    method : {'mean', 'first'}, optional
        None finds it out.
    groups, layers, layout, num_heads : optional
        As they were given to convert_checkpoint. Groups cannot be found out.
    logits : bool
        Also run both models on a token batch, where gqa_ext.llama can.

    Returns
    -------
    Verification
        ``ok``, and ``faults`` that name file and tensor.

    Raises
    ------
    FileNotFoundError, ValueError
        The source cannot be converted in any way, or `dst` is no folder.

    Examples
    --------
    >>> import tempfile
    >>> from gqa_ext import llama
    >>> from gqa_ext.convert import convert_checkpoint
    >>> folder = tempfile.mkdtemp() + "/gqa"
    >>> _ = convert_checkpoint(llama.TINY, folder, 2, method="first", progress=False)
    >>> found = verify_checkpoint(llama.TINY, folder, logits=False)
    >>> found.ok, found.method, set(found.num_kv_heads)
    (True, 'first', {2})
    """
    source, folder = open_source(src, CALL), Path(dst)
    if not folder.is_dir():
        raise FileNotFoundError(f"{CALL}(): dst {folder} is no folder; the folder of a conversion was wanted")
    faults: list[str] = []
    shards = _open_shards(source, folder, faults)
    given = {"groups": groups, "layers": layers, "layout": layout, "num_heads": num_heads, "allow_gqa": True}
    checkpoint, method, output = _find_plan(source, shards, given, (method,) if method else METHODS)
    heads = [layer.num_kv_heads for layer in checkpoint.plan.layers]
    found = Verification(os.fspath(src), os.fspath(dst), method, output, heads, faults=faults)
    for name, shard in shards.items():
        _compare_shard(name, shard, checkpoint, found)
    faults += _other_faults(checkpoint, folder)
    if logits and found.ok:
        uniform = groups is None and len(set(heads)) == 1
        _run(found, source, folder, heads[0] if uniform else None)
    return found


def _run(found: Verification, source: Source, folder: Path, num_kv_heads: int | None) -> None:
    found.logits, found.note = compare_logits(source, folder, num_kv_heads, found.method)
    if found.logits is None:
        return
    difference, bound = (found.logits.get(key, 0.0) for key in ("pooled_difference", "pooled_bound"))
    if not difference <= bound:
        found.faults.append(f"{folder}: logits differ by {difference} from the pooled source's, {bound} was allowed")


def _open_shards(source: Source, folder: Path, faults: list[str]) -> dict[str, Shard]:
    """The files of weights of the result that are there and sound."""
    shards = {}
    for name, shard in source.shards.items():
        path = folder / name
        try:
            with open(path, "rb") as file:
                header = read_header(file)
            shards[name] = Shard(path, shard.stamp, header, len(header.text))
        except OSError as error:
            faults.append(f"{path}: cannot be read ({error.strerror}); a file of weights was wanted")
        except ValueError as error:
            faults.append(f"{path}: {error}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in source.shards:
            faults.append(f"{path}: the source has no such file of weights")
    return shards


# ---- which plan it was ----


def _find_plan(
    source: Source, shards: Mapping[str, Shard], given: dict[str, Any], methods: tuple[str, ...]
) -> tuple[Checkpoint, str, str]:
    """The plan whose layers are most like the result's; the plainer one of equals."""
    model = read_model(CALL, source.config, source.tensors, given["layout"], given["num_heads"])
    numbers = sorted({n for layer in model.layers for n in _divisors(layer.num_kv_heads)}, reverse=True)
    best: tuple[float, list[int], str, str] | None = None
    problem: ValueError | None = None
    for output in ("native", "expanded"):
        for method in methods:
            scores: dict[int, list[float]] = {}
            for n in numbers:
                try:
                    plan = plan_checkpoint(source.path, n, method=method, output=output, **given)
                except ValueError as error:
                    problem = error
                    continue
                scores[n] = _scores(plan, shards)
            if scores:
                choice = _choose(scores)
                total = sum(scores[n][i] for i, n in enumerate(choice))
                if best is None or total > best[0]:
                    best = total, choice, method, output
    if best is None:
        assert problem is not None
        raise problem
    _, choice, method, output = best
    try:
        plan = plan_checkpoint(source.path, choice, method=method, output=output, **given)
    except ValueError:  # layers that no config can tell: one of them is broken
        common = Counter(choice).most_common(1)[0][0]
        plan = plan_checkpoint(source.path, common, method=method, output=output, **given)
    return plan, method, output


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _choose(scores: dict[int, list[float]]) -> list[int]:
    """For each layer the number that fits best; what most layers have where none fits."""
    count = len(next(iter(scores.values())))
    best = [max(scores, key=lambda n: scores[n][i]) for i in range(count)]
    fitting = Counter(n for i, n in enumerate(best) if scores[n][i] > 0)
    common = fitting.most_common(1)[0][0] if fitting else max(scores)
    return [n if scores[n][i] > 0 else common for i, n in enumerate(best)]


def _scores(checkpoint: Checkpoint, shards: Mapping[str, Shard]) -> list[float]:
    """For each layer the share of equal bytes where its key and value tensors begin; 0 where shapes differ."""
    scores = []
    for layer in checkpoint.plan.layers:
        names = {layer.key.name, layer.value.name}
        scores.append(sum(_likeness(name, checkpoint, shards) for name in names) / len(names))
    return scores


def _likeness(name: str, checkpoint: Checkpoint, shards: Mapping[str, Shard]) -> float:
    file = checkpoint.source.shard_of(name)
    shard = shards.get(file)
    info = shard.header.tensors.get(name) if shard else None
    if shard is None or info is None or info.nbytes != tensor_part(name, checkpoint.plan, checkpoint.source).nbytes:
        return 0.0
    equal = total = 0
    for want, got in _streams(name, checkpoint, shard, _SAMPLE, most=_SAMPLES):
        equal += int(np.count_nonzero(np.frombuffer(want, np.uint8) == np.frombuffer(got, np.uint8)))
        total += len(want)
    return equal / total if total else 1.0


# ---- comparing ----


def _streams(
    name: str, checkpoint: Checkpoint, shard: Shard, limit: int, most: int | None = None
) -> Iterator[tuple[bytearray, bytearray]]:
    """A tensor as it should be and as it is, in stretches of equal length; both have the same size.

    At most `most` of them, taken at random, so that they cannot all fall on heads that every plan leaves alone.
    """
    origin = checkpoint.source.shards[checkpoint.source.shard_of(name)]
    place = shard.data_start + shard.header.tensors[name].start
    with open(origin.path, "rb") as old, open(shard.path, "rb") as new:
        pieces = list(tensor_part(name, checkpoint.plan, checkpoint.source).pieces(limit))
        places = list(itertools.accumulate((piece.nbytes for piece in pieces), initial=place))
        chosen: Sequence[int] = range(len(pieces))
        if most is not None and len(pieces) > most:
            chosen = random.Random(0).sample(chosen, most)
        for i in chosen:
            want, got = bytearray(pieces[i].nbytes), bytearray(pieces[i].nbytes)
            pieces[i].fill(old.fileno(), memoryview(want), {})
            read_exactly(new.fileno(), memoryview(got), places[i])
            yield want, got


def _compare_shard(name: str, shard: Shard, checkpoint: Checkpoint, found: Verification) -> None:
    """Header and all tensors of one file of the result."""
    given = checkpoint.shards[name][0].data  # type: ignore[union-attr]  # every shard opens with its header
    wanted = _header_of(given)
    faults = list(_header_faults(wanted, shard.header))
    if not faults and shard.header.text != given:
        faults.append("the header says the same in other bytes")
    for tensor, info in wanted.tensors.items():
        there = shard.header.tensors.get(tensor)
        if there is None or (there.dtype, there.shape) != (info.dtype, info.shape):
            continue
        derived = tensor in checkpoint.plan.tensors
        found.derived, found.copied = found.derived + derived, found.copied + (not derived)
        for want, got in _streams(tensor, checkpoint, shard, _CHUNK):
            if want != got:
                what = "what pooling the source gives" if derived else "the source"
                faults.append(f"tensor {tensor}: its bytes are not those of {what}")
                break
    found.faults += [f"{shard.path}: {fault}" for fault in faults[:_MOST]]
    if len(faults) > _MOST:
        found.faults.append(f"{shard.path}: and {len(faults) - _MOST} more")


def _header_of(text: bytes) -> Header:
    """The header of a file that is not there, which is sound."""
    nbytes = max((entry["data_offsets"][1] for key, entry in json.loads(text[8:]).items() if key != "__metadata__"),
                 default=0)  # fmt: skip
    tensors, metadata = parse_header(text[8:], nbytes)
    return Header(text, tensors, metadata)


def _header_faults(wanted: Header, there: Header) -> Iterator[str]:
    for name, info in wanted.tensors.items():
        other = there.tensors.get(name)
        if other is None:
            yield f"tensor {name} is missing"
        elif (other.dtype, other.shape) != (info.dtype, info.shape):
            yield f"tensor {name} is {other.dtype} {other.shape}; {info.dtype} {info.shape} was wanted"
    for name in there.tensors.keys() - wanted.tensors.keys():
        yield f"tensor {name} is not in the source"
    if wanted.tensors.keys() == there.tensors.keys():
        for order, others, what in (
            (wanted.data_order, there.data_order, "data"),
            (list(wanted.tensors), list(there.tensors), "header"),
        ):
            moved = [name for name, place in zip(order, others, strict=True) if name != place]
            if moved:
                yield f"tensor {moved[0]} is not in the source's order of the {what}"
    for key in sorted(wanted.metadata.keys() | there.metadata.keys()):
        old, new = wanted.metadata.get(key), there.metadata.get(key)
        if old != new:
            yield f"metadata {key!r:.80} is {new!r:.80}; {old!r:.80} was wanted"


def _other_faults(checkpoint: Checkpoint, folder: Path) -> Iterator[str]:
    """Index, config and companions."""
    for name, text in checkpoint.texts.items():
        path = folder / name
        try:
            there = path.read_bytes()
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror}); it was wanted"
            continue
        if there != text.encode():
            yield from (f"{path}: {fault}" for fault in _text_faults(text, there))
    for name, origin in checkpoint.source.companions.items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: is missing; the source has it"
        elif path.read_bytes() != origin.read_bytes():
            yield f"{path}: its bytes are not those of the source"


def _text_faults(wanted: str, there: bytes) -> list[str]:
    try:
        faults = list(_json_faults("", json.loads(wanted), json.loads(there)))
    except (ValueError, RecursionError):
        return ["is not sound JSON"]
    return faults[:_MOST] or ["says the same in other bytes"]


def _json_faults(place: str, wanted: Any, there: Any) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(there, dict):
        absent = "absent"
        for key in [*wanted, *(key for key in there if key not in wanted)]:
            yield from _json_faults(f"{place}.{key}" if place else key, wanted.get(key, absent), there.get(key, absent))
    elif wanted != there or type(wanted) is not type(there):
        yield f"{place} is {there!r:.80}; {wanted!r:.80} was wanted"
