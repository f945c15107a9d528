"""What is converted: the files of a checkpoint, found and proven sound by their headers alone.

A source is a Hugging Face folder (config.json, model.safetensors or shards with their index) or one
.safetensors or .npz file, with config.json beside it unless it is a lone state dict. Links are followed: in a Hub
cache every file is one. Nothing is trusted: an index may be hostile, a shard cut short, a file a pipe.
Nothing is written here. Called by checkpoint.py, and by whatever else reads a checkpoint.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .header import MAX_HEADER, Header, TensorInfo, read_header
from .npz import read_npz

__all__ = ["Shard", "Source", "Stamp", "open_source", "plain_name", "stamp_of"]

CALL = "convert_checkpoint()"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Formats of weights: beside a converted model they would hold the unconverted one.
WEIGHT_FORMATS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot", ".npz", ".pkl")
MAX_SMALL = 100_000_000  # bytes; the largest tokenizer.json in use have 35 million
# Beside a single file may lie anything, so only what belongs to a model goes along.
COMPANION = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|generation_config|chat_template|(pre)?processor"
    r"|spiece|sentencepiece|licen[cs]e|notice|readme|use_policy).*",
    re.IGNORECASE,
)


class Stamp(NamedTuple):
    """Tells a file from a changed one: the change time moves even where the modification time was set back."""

    inode: int
    nbytes: int
    modified: int
    changed: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of what os.stat or os.fstat said."""
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Shard(NamedTuple):
    """One file of weights."""

    path: Path
    stamp: Stamp
    header: Header
    data_start: int  # what the tensors' starts count from


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes
    ----------
    path : Path
        What was asked for: a folder or a file.
    folder : Path
    config_text, index_text : str or None
        As they lie on disk; None where there is none.
    config, index : dict
    index_name : str
    shards : dict of str to Shard
        By file name in the result, in the order of the index.
    companions : dict of str to Path
        Small files that go along, by their name relative to the folder.
    skipped : tuple of str
        Files that do not.
    """

    path: Path
    folder: Path
    config_text: str | None
    config: dict[str, Any]
    index_text: str | None
    index: dict[str, Any]
    index_name: str
    shards: dict[str, Shard]
    companions: dict[str, Path]
    skipped: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {name: info for shard in self.shards.values() for name, info in shard.header.tensors.items()}

    def shard_of(self, tensor: str) -> str:
        """The file that holds a tensor."""
        return next(name for name, shard in self.shards.items() if tensor in shard.header.tensors)

    def files(self) -> Iterator[Path]:
        """Every file that is read."""
        yield from (shard.path for shard in self.shards.values())
        yield from self.companions.values()
        texts = {CONFIG: self.config_text, self.index_name: self.index_text}
        yield from (self.folder / name for name, text in texts.items() if text is not None)


def open_source(src: str | os.PathLike[str], call: str = "convert_checkpoint", argument: str = "src") -> Source:
    """Find the files of `src` and read its config, its index and the headers of its shards.

    `call` and `argument` are whose and which it is in messages.
    """
    try:
        return _find(src)
    except (ValueError, FileNotFoundError) as error:
        if f"{call}()" == CALL:
            raise
        message = str(error).replace(f"{CALL}: src ", f"{call}(): {argument} ").replace(CALL, f"{call}()")
        raise type(error)(message) from None


def _find(src: str | os.PathLike[str]) -> Source:
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(f"{CALL}: src {path} does not exist; a model folder or a .safetensors file was wanted")
    alone = not path.is_dir()
    folder = path.parent if alone else path
    if path.name.endswith(PICKLES) and alone:
        refuse_pickle(path)
    if alone and path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{CALL}: src {path} is no .safetensors or .npz; a model folder or such a file was wanted")
    config_text = _read_text(folder / CONFIG) if not alone or os.path.lexists(folder / CONFIG) else None
    config = {} if config_text is None else _parse_object(folder / CONFIG, config_text)
    index_name, index_text = ("", None) if alone else _find_index(folder)
    index = {} if index_text is None else _parse_object(folder / index_name, index_text)
    names = [path.name] if alone else _shard_names(folder, index_name, index)
    shards = {_result_name(name): _open_shard(folder / name) for name in names}
    _check_unique(shards)
    if index_text is not None:
        _check_index(folder / index_name, index["weight_map"], shards)
    companions, skipped = _companions(folder, {*names, CONFIG, index_name}, alone)
    return Source(path, folder, config_text, config, index_text, index, index_name, shards, companions, skipped)


def refuse_pickle(path: Path, call: str = CALL) -> NoReturn:
    """Unpickling runs code of the file; only the owner can decide to."""
    target = path.with_suffix(".safetensors")
    save = f"from safetensors.torch import save_file; sd = torch.load({str(path)!r}, weights_only=True)"
    raise ValueError(
        f"{call}: {path} is a pickle, which can run any code when it is read; a .safetensors file was wanted; "
        f'if you trust it, save it again: python -c "import torch; {save}; '
        f'save_file({{k: v.clone().contiguous() for k, v in sd.items()}}, {str(target)!r}, {{\'format\': \'pt\'}})"'
    )


def plain_name(name: object) -> bool:
    """A file name that stays in its folder, on any system."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and not set(name) & set("/\\:")


def _regular(path: Path) -> os.stat_result:
    """Status of a file that can be read to its end: no pipe, no device."""
    try:
        status = path.stat()
    except FileNotFoundError:
        what = "is a link to a file that is not there" if path.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{CALL}: {path} {what}; fetch the model again") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{CALL}: {path} is no regular file; one was wanted")
    return status


def _read_text(path: Path) -> str:
    if _regular(path).st_size > MAX_HEADER:
        raise ValueError(f"{CALL}: {path} has {path.stat().st_size} bytes; at most {MAX_HEADER} are read")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{CALL}: {path} is not UTF-8 ({error})") from None


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CALL}: {path} is not sound JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{CALL}: {path} holds {parsed!r:.80}; a JSON object was wanted")
    return parsed


def _find_index(folder: Path) -> tuple[str, str | None]:
    """Name and text of the index; a model.safetensors goes before it, as in transformers."""
    if os.path.lexists(folder / WEIGHTS) or not os.path.lexists(folder / INDEX):
        return "", None
    return INDEX, _read_text(folder / INDEX)


def _shard_names(folder: Path, index_name: str, index: dict[str, Any]) -> list[str]:
    if not index_name:
        return [only_file(folder)]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{CALL}: {folder / index_name}: weight_map is {weight_map!r:.80}; tensor: shard was wanted")
    for tensor, name in weight_map.items():
        if not plain_name(name):
            raise ValueError(
                f"{CALL}: {folder / index_name}: tensor {tensor!r:.200}: its shard is {name!r:.200}; "
                "a plain file name was wanted, for a shard lies in the model's folder"
            )
    return list(dict.fromkeys(weight_map.values()))


def only_file(folder: Path, call: str = CALL) -> str:
    """The weights of a folder without index."""
    if (folder / WEIGHTS).exists():
        return WEIGHTS
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(found[:4])
        raise ValueError(f"{call}: {folder} has {several} but neither {WEIGHTS} nor {INDEX}; pass one of the files")
    pickles = [path for path in folder.iterdir() if path.name.endswith(PICKLES) and path.is_file()]
    if pickles:  # not the optimizer's, if there is a model's
        refuse_pickle(min(pickles, key=lambda path: ("model" not in path.name, path.name)), call)
    raise FileNotFoundError(f"{call}: {folder} has neither {WEIGHTS} nor {INDEX}; a folder with weights was wanted")


def _open_shard(path: Path) -> Shard:
    _regular(path)
    with open(path, "rb") as file:
        try:
            stamp = stamp_of(os.fstat(file.fileno()))
            if path.suffix == ".npz":
                return Shard(path, stamp, read_npz(path), 0)
            header = read_header(file)
            return Shard(path, stamp, header, len(header.text))
        except ValueError as error:
            raise ValueError(f"{CALL}: {path}: {error}") from None


def _result_name(name: str) -> str:
    """What a file of weights becomes: always safetensors."""
    return f"{name.removesuffix('.npz')}.safetensors" if name.endswith(".npz") else name


def _check_unique(shards: dict[str, Shard]) -> None:
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.header.tensors:
            if name in seen:
                raise ValueError(f"{CALL}: {shard.path}: tensor {name!r:.200} is also in {seen[name]}; one was wanted")
            seen[name] = file


def _check_index(path: Path, weight_map: dict[str, str], shards: dict[str, Shard]) -> None:
    for tensor, name in weight_map.items():
        if tensor not in shards[name].header.tensors:
            raise ValueError(f"{CALL}: {path}: tensor {tensor!r:.200} is not in {name}, where the index has it")


def _companions(folder: Path, known: set[str], alone: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Small files that go along, and what stays: weights, large and hidden folders' files."""
    taken, skipped = {}, []
    for name in _walk(folder, deep=not alone):
        if name in known or (alone and not COMPANION.fullmatch(name)):
            continue
        path = folder / name
        if _is_weight(name):
            skipped.append(name)
            continue
        small = not path.exists() or (path.is_file() and path.stat().st_size <= MAX_SMALL)
        if small:
            _regular(path)  # a link to nothing is an incomplete source
            taken[name] = path
        else:
            skipped.append(name)
    return taken, tuple(skipped)


def _is_weight(name: str) -> bool:
    """Weights of some format, or the index of such."""
    name = name.lower()
    return name.endswith(WEIGHT_FORMATS) or name.endswith(tuple(f"{suffix}.index.json" for suffix in WEIGHT_FORMATS))


def _walk(folder: Path, deep: bool) -> Iterator[str]:
    """Names of files relative to the folder; folders that are hidden or links are not entered."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if deep and not name.startswith("."))
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in sorted(files))
