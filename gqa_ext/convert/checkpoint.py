"""Whole checkpoints: from a source and a plan to tasks, and through them to a destination.

layouts.py says what changes, source.py what is there, tasks.py makes files, destination.py lets them appear.
Every refusal comes before the first byte of data is read and the first byte is written. Called by users.
"""

import dataclasses
import hashlib
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._arguments import as_flag
from .._messages import fail, kind
from .destination import Destination
from .execute import Progress, execute
from .header import DTYPES, TensorInfo, reshape_header
from .jsontext import edit_json
from .layouts import ModelPlan, plan_model
from .logits import bits_per_token
from .parts import Copy, Given, Join, Part, Pool, StandIn
from .report import ConversionReport, LayerReport
from .source import CONFIG, Shard, Source, Stamp, open_source, stamp_of
from .tasks import CHUNKS, LANES, FileRecord, FileTask

__all__ = ["Checkpoint", "convert_checkpoint", "kv_bytes", "plan_checkpoint", "tensor_part"]

CALL = "convert_checkpoint"
DEFAULT_MEMORY, LEAST_MEMORY = 256_000_000, 24_000_000  # bytes above the interpreter
OVERHEAD = 12_000_000  # of them for modules, headers, threads and what their allocators keep
MAX_CHUNK, MIN_CHUNK = 1 << 20, 1 << 16  # a ring of the former stays in the cache between its threads


@dataclass(frozen=True)
class Checkpoint:
    """A source with what is to become of it; nothing is written yet.

    Attributes
    ----------
    source : Source
    plan : ModelPlan
    shards : dict of str to tuple of Part
        What each file of weights will be.
    texts : dict of str to str
        Index and config as they will be, in the order in which they are put in place.
    """

    source: Source
    plan: ModelPlan
    shards: dict[str, tuple[Part, ...]]
    texts: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The files of the result, in the order in which they are put in place."""
        return [*self.shards, *self.source.companions, *self.texts]

    @property
    def nbytes(self) -> int:
        """Size of the result."""
        weights = sum(part.nbytes for parts in self.shards.values() for part in parts)
        others = sum(path.stat().st_size for path in self.source.companions.values())
        return weights + others + sum(len(text.encode()) for text in self.texts.values())

    def digest(self, *choices: str) -> str:
        """Names this plan over this state of the source."""
        stamps = [stamp_of(path.stat()) for path in self.source.files()]
        whole = repr((self.names, self.shards, self.texts, self.plan.layers, stamps, choices))
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    num_kv_heads: int | Sequence[int],
    *,
    method: str = "mean",
    groups: Any = None,
    layers: Iterable[int] | None = None,
    output: str = "native",
    max_memory: int | None = None,
    executor: Any = None,
    allow_gqa: bool = False,
    overwrite: bool = False,
    progress: bool | Callable[[int, int], object] | None = None,
    layout: Any = None,
    num_heads: int | None = None,
    evaluate: Any = None,
) -> ConversionReport:
    """Convert a multi-head checkpoint to grouped-query attention by pooling its key and value heads [1]_.

    Everything that is not K or V keeps its bytes, its place, its shard and its metadata. Memory is bounded whatever
    the size of a file; a run that was killed goes on where it stopped when it is called again.

    Parameters
    ----------
    src : str or path-like
        A Hugging Face folder (config.json with model.safetensors or shards and their index), or one .safetensors file
        with config.json beside it; without one it is a lone state dict, which needs `num_heads`. An .npz of
        `numpy.savez` is taken as well and becomes a .safetensors file.
    dst : str or path-like
        A folder that is not there or is empty, outside the source. It appears when all is done.
    num_kv_heads : int or sequence of int
        Key/value heads wanted, for all layers or one for each.
    method, groups
        As in :func:`pool_heads`; groups also as a dict from layer to groups. Query heads are permuted to match.
    layers : iterable of int, optional
        Pool only these layers.
    output : {'native', 'expanded'}
        'expanded' repeats the pooled heads back, for architectures that cannot express fewer of them.
    max_memory : int, optional
        Bytes above the interpreter, at least 24 million; None means 256 million.
    executor : object, optional
        Anything with ``submit(function, task)`` that returns futures: a pool of concurrent.futures, a Dask Client, an
        MPIPoolExecutor. A task is one file of weights, and `max_memory` holds in each process. Source and destination
        must be there under the same paths. None uses threads of this process.
    allow_gqa : bool
        Take a source that is grouped already.
    overwrite : bool
        Replace the files of a model that is in `dst`; files that belong to none stay.
    progress : callable, bool or None
        Called as ``progress(done_bytes, total_bytes)``; what it raises ends the run. None shows a bar on a terminal.
    layout : dict, optional
        Names the tensors of an unknown architecture; see the error that lists the known ones.
    num_heads : int, optional
        Query heads, where no config says.
    evaluate : array_like of int (..., S), optional
        Tokens on which source and result are run by gqa_ext.llama, which must know the architecture; the report then
        has the bits per token of both. The models are loaded whole, whatever `max_memory` says.

    Returns
    -------
    ConversionReport

    Raises
    ------
    FileNotFoundError
        The source, a shard or the config is missing.
    FileExistsError
        `dst` holds something and `overwrite` is False, or another run is writing it.
    OSError
        The disk is full, read-only or broken. Finished shards wait for the next call.
    ValueError
        Anything that cannot be converted, by file and tensor; before any data is read or written.

    References
    ----------
    .. [1] Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
       Checkpoints", 2023, https://arxiv.org/abs/2305.13245

    Examples
    --------
    >>> import pathlib, tempfile, gqa_ext
    >>> from gqa_ext.convert import convert_checkpoint
    >>> source = pathlib.Path(gqa_ext.__file__).parent / "tiny"
    >>> report = convert_checkpoint(source, tempfile.mkdtemp() + "/gqa", 2, progress=False)
    >>> report.kv_bytes_before // report.kv_bytes_after, sorted(report.files)
    (4, ['README.md', 'config.json', 'heldout.txt', 'model.safetensors'])
    """
    started = time.monotonic()
    chunk = _chunk(max_memory)
    meter = Progress(progress)
    if executor is not None and not callable(getattr(executor, "submit", None)):
        fail(TypeError, CALL, f"executor is {kind(executor)}", "an object with submit() was wanted", "leave it out")
    choices = {"method": method, "groups": groups, "layers": layers, "output": output, "allow_gqa": allow_gqa}
    checkpoint = plan_checkpoint(src, num_kv_heads, **choices, layout=layout, num_heads=num_heads)
    destination = Destination(dst, checkpoint.source, as_flag(CALL, "overwrite", overwrite))
    bits = None if evaluate is None else bits_per_token(checkpoint.source.folder, evaluate)
    digest = checkpoint.digest(method, output)
    with destination.opened(digest, checkpoint.names) as (folder, finished):
        if finished is not None:
            return _evaluated(ConversionReport.from_dict(finished), bits, evaluate)
        tasks = _tasks(checkpoint, os.fspath(folder), chunk)
        weights = len(checkpoint.shards)
        meter.total = sum(task.nbytes for task in tasks)
        with meter:
            records = execute(tasks[:weights], executor, meter) + execute(tasks[weights:], None, meter)
        report = _report(checkpoint, records, method, output, os.fspath(destination.path))
        report = dataclasses.replace(report, seconds=time.monotonic() - started)
        destination.publish(digest, checkpoint.names, report.to_dict(), tasks[0].attempt)
    return _evaluated(report, bits, evaluate)


def plan_checkpoint(src: str | os.PathLike[str], num_kv_heads: int | Sequence[int], **choices: Any) -> Checkpoint:
    """What :func:`convert_checkpoint` would do, from headers alone; `choices` are its arguments."""
    source = open_source(src)
    tensors = source.tensors
    try:
        plan = plan_model(source.config, tensors, num_kv_heads, **choices)
    except ValueError as error:
        raise ValueError(_with_file(str(error), source)) from None
    shards = {name: _parts(shard, plan, source) for name, shard in source.shards.items()}
    return Checkpoint(source, plan, shards, _texts(source, plan))


def _with_file(message: str, source: Source) -> str:
    """The message with the file of the tensor that it names, else of the config."""
    named = [name for name in source.tensors if f"tensor {name} " in message]
    where = source.shards[source.shard_of(max(named, key=len))].path if named else source.folder / CONFIG
    if not named and source.config_text is None:
        where = source.path
    call, _, rest = message.partition("(): ")
    return f"{call}(): {where}: {rest}"


def _chunk(max_memory: Any) -> int:
    """Bytes of a buffer, so that all of them fit."""
    if max_memory is None:
        max_memory = DEFAULT_MEMORY
    if isinstance(max_memory, bool) or not isinstance(max_memory, int):
        fail(TypeError, CALL, f"max_memory is {kind(max_memory)}", "a number of bytes was wanted", "leave it out")
    if max_memory < LEAST_MEMORY:
        wanted = f"at least {LEAST_MEMORY} bytes were wanted"
        fail(ValueError, CALL, f"max_memory is {max_memory}", wanted, "leave it out for 256 million")
    return max(MIN_CHUNK, min(MAX_CHUNK, (max_memory - OVERHEAD) // (LANES * CHUNKS)))


# ---- what each file will be ----


def _parts(shard: Shard, plan: ModelPlan, source: Source) -> tuple[Part, ...]:
    """Header and tensors of one file; stretches that stay are joined."""
    header = shard.header
    dropped = set(plan.dropped) & header.tensors.keys()
    shapes = {name: _shape(name, plan, source) for name in plan.tensors.keys() & header.tensors.keys()}
    parts: list[Part] = [Given(reshape_header(header, shapes, dropped))]
    for name in header.data_order:
        if name in dropped:
            continue
        last = parts[-1]
        part = tensor_part(name, plan, source, shard)
        if isinstance(last, Copy) and isinstance(part, Copy) and last.start + last.nbytes == part.start:
            parts[-1] = Copy(last.start, last.nbytes + part.nbytes)
        else:
            parts.append(part)
    return tuple(parts)


def tensor_part(name: str, plan: ModelPlan, source: Source, shard: Shard | None = None) -> Join | Pool | Copy:
    """One tensor of the result; `shard` is where it lies in the source, if that is known."""
    shard = shard or source.shards[source.shard_of(name)]
    info = shard.header.tensors[name]
    moved = info._replace(start=shard.data_start + info.start)
    if name in plan.joined:
        return _join(name, plan, source)
    if name in plan.tensors:
        return Pool(moved, plan.tensors[name], _stand_ins(name, plan))
    return Copy(moved.start, info.nbytes)


def _shape(name: str, plan: ModelPlan, source: Source) -> tuple[int, ...]:
    """Shape of a tensor that changes."""
    if name in plan.joined:
        return plan.tensors[name].shape((sum(source.tensors[part].shape[0] for part in plan.joined[name]),))
    return plan.tensors[name].shape(source.tensors[name].shape)


def _join(name: str, plan: ModelPlan, source: Source) -> Join:
    reads = []
    for part in plan.joined[name]:
        shard = source.shards[source.shard_of(part)]
        info = shard.header.tensors[part]
        if info.dtype != source.tensors[name].dtype:
            raise ValueError(f"{CALL}(): {shard.path}: tensor {part} has dtype {info.dtype}, tensor {name} another")
        reads.append((os.fspath(shard.path), shard.data_start + info.start, info.nbytes))
    dtype = DTYPES[source.tensors[name].dtype][1]
    assert dtype is not None  # plan_model pools four dtypes
    return Join(tuple(reads), dtype, plan.tensors[name])


def _stand_ins(name: str, plan: ModelPlan) -> tuple[StandIn, ...]:
    """Which heads of this tensor are measured."""
    found = []
    for layer in plan.layers:
        for role, heads in (("k", layer.key), ("v", layer.value)):
            if heads.name == name:
                pairs = Counter(zip(heads.before, heads.after, strict=True))
                found += [StandIn(f"{role}{layer.index}", new, old, count) for (old, new), count in pairs.items()]
    return tuple(found)


def _texts(source: Source, plan: ModelPlan) -> dict[str, str]:
    texts = {}
    if source.index_text is not None:
        texts[source.index_name] = edit_json(source.index_text, _new_index(source, plan))
    if source.config_text is not None:
        same = plan.config == source.config
        texts[CONFIG] = source.config_text if same else edit_json(source.config_text, plan.config)
    return texts


def _new_index(source: Source, plan: ModelPlan) -> dict[str, Any]:
    """The index without dropped tensors and with new totals, where it has totals."""
    infos = _result(source, plan)
    index = dict(source.index)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in infos}
    if isinstance(index.get("metadata"), dict):
        index["metadata"] = dict(index["metadata"])
        totals = {
            "total_size": sum(info.nbytes for info in infos.values()),
            "total_parameters": sum(math.prod(info.shape) for info in infos.values()),
        }
        index["metadata"].update((key, total) for key, total in totals.items() if key in index["metadata"])
    return index


def _result(source: Source, plan: ModelPlan) -> dict[str, TensorInfo]:
    """All tensors as they will be."""
    infos = {name: info for name, info in source.tensors.items() if name not in plan.dropped}
    return infos | {name: infos[name]._replace(shape=_shape(name, plan, source)) for name in plan.tensors}


def _tasks(checkpoint: Checkpoint, folder: str, chunk: int) -> list[FileTask]:
    """One for each file, weights first."""
    attempt = secrets.token_hex(8)
    tasks = []
    for name, parts in checkpoint.shards.items():
        shard = checkpoint.source.shards[name]
        tasks.append(FileTask(name, parts, os.fspath(shard.path.absolute()), shard.stamp, folder, attempt, chunk))
    for name, path in checkpoint.source.companions.items():
        stamp: Stamp = stamp_of(path.stat())
        parts = (Copy(0, stamp.nbytes),)
        tasks.append(FileTask(name, parts, os.fspath(path.absolute()), stamp, folder, attempt, chunk))
    for name, text in checkpoint.texts.items():
        tasks.append(FileTask(name, (Given(text.encode()),), None, None, folder, attempt, chunk))
    return tasks


# ---- what was done ----


def _report(
    checkpoint: Checkpoint, records: list[FileRecord], method: str, output: str, destination: str
) -> ConversionReport:
    source, plan = checkpoint.source, checkpoint.plan
    sums = {label: pair for record in records for label, pair in record.sums.items()}
    before, after = source.tensors, _result(source, plan)
    rows = tuple(
        LayerReport(
            layer.index, layer.num_heads, layer.num_kv_heads_before, layer.num_kv_heads,
            _error(sums, f"k{layer.index}"), _error(sums, f"v{layer.index}"),
        )
        for layer in plan.layers
    )  # fmt: skip
    return ConversionReport(
        source=os.fspath(source.path), destination=destination, architecture=plan.architecture, method=method,
        output=output, groups={layer.index: layer.groups for layer in plan.layers}, layers=rows,
        parameters_before=sum(math.prod(info.shape) for info in before.values()),
        parameters_after=sum(math.prod(info.shape) for info in after.values()),
        kv_bytes_before=kv_bytes(before, plan, before=True),
        kv_bytes_after=kv_bytes(before, plan, before=output == "expanded"),
        seconds=0.0, files={record.name: record.sha256 for record in records}, skipped=source.skipped,
        resumed=tuple(record.name for record in records if record.resumed),
    )  # fmt: skip


def _evaluated(report: ConversionReport, bits: float | None, tokens: Any) -> ConversionReport:
    """The report with the bits per token of the result beside the source's."""
    if bits is None:
        return report
    after = bits_per_token(report.destination, tokens)
    return dataclasses.replace(report, bits_per_token_before=bits, bits_per_token_after=after)


def _error(sums: Mapping[str, tuple[float, float]], label: str) -> float:
    distance, norm = sums.get(label, (0.0, 0.0))
    return math.sqrt(distance / norm) if distance else 0.0


def kv_bytes(tensors: Mapping[str, TensorInfo], plan: ModelPlan, before: bool) -> int:
    """Of one token: keys and values of all layers."""
    total = 0
    for layer in plan.layers:
        bits, _ = DTYPES[tensors[layer.key.name].dtype]
        heads = layer.num_kv_heads_before if before else layer.num_kv_heads
        total += heads * (layer.head_dim + layer.v_head_dim) * bits // 8
    return total
