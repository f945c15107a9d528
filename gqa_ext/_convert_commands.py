"""The words `convert`, `inspect` and `verify` of the command line; flags are the arguments of gqa_ext.convert.

Each function of a word takes the parsed arguments and returns an exit code: 0 done, 1 bad input. Errors are one line
on stderr; the report of --json alone is on stdout. Called by __main__.py, which answers Ctrl-C.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_words", "one_line"]

Arguments = argparse.Namespace


def add_words(words: Any) -> None:
    """Add the three words to the subparsers of the command line."""
    _add_convert(words)
    word = _add(words, "inspect", inspect, "what a checkpoint holds: heads, layers, tensors, cache bytes per token")
    word.add_argument("path", metavar="PATH", help="a model folder, or a .safetensors or .npz file")
    _add_source_flags(word)
    word = _add(words, "verify", verify, "prove that a converted checkpoint is what its source gives, byte for byte")
    word.add_argument("src", metavar="SRC")
    word.add_argument("dst", metavar="DST")
    word.add_argument("--method", choices=("mean", "first"), help="found out where it is left out")
    word.add_argument("--no-logits", action="store_true", help="do not run the two models")
    _add_choices(word)


def _add(words: Any, name: str, run: Callable[[Arguments], int], text: str) -> argparse.ArgumentParser:
    word: argparse.ArgumentParser = words.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    word.set_defaults(run=_guarded(name, run))
    word.add_argument("--json", action="store_true", help="print the result as JSON")
    return word


def _add_convert(words: Any) -> None:
    word = _add(words, "convert", convert, "pool the key/value heads of a checkpoint on disk")
    word.add_argument("src", metavar="SRC", help="a model folder, or a .safetensors or .npz file")
    word.add_argument("dst", metavar="DST", help="a folder that is not there yet or is empty")
    word.add_argument(
        "--num-kv-heads", type=_numbers, required=True, metavar="N", help="for all layers, or N,N,... for each"
    )
    word.add_argument("--method", choices=("mean", "first"), default="mean")
    word.add_argument("--output", choices=("native", "expanded"), default="native")
    word.add_argument("--max-memory", type=int, metavar="BYTES", help="above the interpreter; 256 million otherwise")
    word.add_argument("--allow-gqa", action="store_true", help="take a source that is grouped already")
    word.add_argument("--overwrite", action="store_true", help="replace the model in DST")
    word.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    _add_choices(word)


def _add_choices(word: argparse.ArgumentParser) -> None:
    word.add_argument("--groups", type=_groups, metavar="JSON", help='[[0,2],[1,3]], or {"LAYER": [[...]]}')
    word.add_argument("--layers", type=_layers, metavar="0-15,20", help="pool only these")
    _add_source_flags(word)


def _add_source_flags(word: argparse.ArgumentParser) -> None:
    word.add_argument("--num-heads", type=int, metavar="N", help="query heads, where no config says")
    word.add_argument("--layout", type=json.loads, metavar="JSON", help="names the tensors of an unknown architecture")


def _guarded(name: str, run: Callable[[Arguments], int]) -> Callable[[Arguments], int]:
    """`run`, whose errors of input become one line and exit code 1."""

    def guarded(arguments: Arguments) -> int:
        try:
            return run(arguments)
        except BrokenPipeError:
            raise  # the reader of stdout has gone, which __main__ answers
        except (OSError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
            print(f"gqa-ext {name}: {one_line(error)}", file=sys.stderr)
            return 1

    return guarded


def one_line(error: Exception) -> str:
    """The message without line breaks, and without the number of the system's error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        named = error.filename is not None and str(error.filename) not in error.strerror
        text = f"{error.strerror}: {error.filename}" if named else error.strerror
    return " ".join(text.split()) or type(error).__name__


# ---- values of flags ----


def _numbers(text: str) -> int | list[int]:
    numbers = [int(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def _layers(text: str) -> list[int]:
    """``0-15,20``: both ends count."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        stretch = range(int(first), int(last if dash else first) + 1)
        if not stretch:
            raise ValueError(part)
        layers += stretch
    return layers


def _groups(text: str) -> Any:
    groups = json.loads(text)
    return {int(layer): lists for layer, lists in groups.items()} if isinstance(groups, dict) else groups


# ---- the words ----


def convert(arguments: Arguments) -> int:
    """Convert, or tell what would be done."""
    from .convert import convert_checkpoint

    names = ("method", "groups", "layers", "output", "allow_gqa", "layout", "num_heads")
    choices = {name: getattr(arguments, name) for name in names}
    if arguments.dry_run:
        return _dry_run(arguments, choices)
    report = convert_checkpoint(
        arguments.src, arguments.dst, arguments.num_kv_heads, **choices,
        max_memory=arguments.max_memory, overwrite=arguments.overwrite, progress=True,
    )  # fmt: skip
    if arguments.json:
        print(report.to_json())
        return 0
    print(f"{report.destination}: {report.architecture}, method {report.method}, output {report.output}")
    print(f"parameters: {report.parameters_before:,} -> {report.parameters_after:,}")
    print(f"KV bytes per token: {report.kv_bytes_before:,} -> {report.kv_bytes_after:,}")
    for row in report.layers:
        heads = f"{row.num_kv_heads_before} -> {row.num_kv_heads} key/value heads"
        print(f"  layer {row.layer}: {heads}, error of k {row.key_error:.4f}, of v {row.value_error:.4f}")
    print(f"{len(report.files)} files in {report.seconds:.1f} s")
    return 0


def _dry_run(arguments: Arguments, choices: dict[str, Any]) -> int:
    from .convert.checkpoint import _chunk, plan_checkpoint
    from .convert.destination import Destination

    _chunk(arguments.max_memory)  # refuses too little
    checkpoint = plan_checkpoint(arguments.src, arguments.num_kv_heads, **choices)
    Destination(arguments.dst, checkpoint.source, arguments.overwrite)  # refuses what cannot be written to
    source, plan = checkpoint.source, checkpoint.plan
    changed = {*plan.tensors, *plan.dropped}
    summary = {
        "architecture": plan.architecture,
        "pooled": sorted(plan.tensors),
        "dropped": sorted(plan.dropped),
        "copied": [name for name in source.tensors if name not in changed],
        "files": checkpoint.names,
        "left_out": list(source.skipped),
        "bytes_before": sum(path.stat().st_size for path in source.files()),
        "bytes_after": checkpoint.nbytes,
    }
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return 0
    print(f"{arguments.src}: {plan.architecture}, {len(plan.layers)} layers; nothing is written")
    for layer in plan.layers:
        print(f"  layer {layer.index}: {layer.num_kv_heads_before} -> {layer.num_kv_heads} key/value heads")
    for key in ("pooled", "dropped", "copied", "files", "left_out"):
        listed: Any = summary[key]
        print(f"{key.replace('_', ' ')}: {len(listed)}")
        print("".join(f"  {name}\n" for name in listed), end="")
    print("refused: nothing")
    print(f"bytes before: {summary['bytes_before']:,}\nbytes after: {summary['bytes_after']:,}")
    return 0


def inspect(arguments: Arguments) -> int:
    """Print what a checkpoint holds."""
    from .convert.inspect import inspect_checkpoint

    found = inspect_checkpoint(Path(arguments.path), num_heads=arguments.num_heads, layout=arguments.layout)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['path']}: {len(found['tensors'])} tensors, {found['parameters']:,} parameters")
    print(f"bytes: {found['nbytes']:,} (" + ", ".join(f"{k} {v:,}" for k, v in found["dtypes"].items()) + ")")
    _print_attention(found)
    for file, facts in found["files"].items():
        print(f"{file}: metadata {json.dumps(facts['metadata'])}")
        for name, info in found["tensors"].items():
            if info["file"] == file:
                print(f"  {info['dtype']:8} {info['shape']!s:20} {info['nbytes']:14,} {name}")
    return 0


def _print_attention(found: dict[str, Any]) -> None:
    attention = found["attention"]
    if attention is None:
        print(f"model_type: {found['model_type']}\nattention: not read: {found['reason']}")
        return

    def numbers(key: str) -> str:
        return ", ".join(map(str, sorted(set(attention[key]))))

    print(f"architecture: {attention['architecture']}, layers: {attention['layers']}")
    print(f"heads: {numbers('num_heads')}, key/value heads: {numbers('num_kv_heads')}, head_dim: {numbers('head_dim')}")
    print(f"dtype: {numbers('dtype')}")
    print(f"KV bytes per token: {attention['kv_bytes_per_token']:,}")
    for heads, nbytes in attention["kv_bytes_per_token_at"].items():
        print(f"  at num_kv_heads {heads}: {nbytes:,}")
    if not attention["expresses_gqa"]:
        print("the format cannot express fewer key/value heads: convert with --output expanded")


def verify(arguments: Arguments) -> int:
    """Check all promises; 1 where one is broken."""
    from .convert.verify import verify_checkpoint

    names = ("method", "groups", "layers", "layout", "num_heads")
    choices = {name: getattr(arguments, name) for name in names}
    found = verify_checkpoint(arguments.src, arguments.dst, **choices, logits=not arguments.no_logits)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found) | {"ok": found.ok}, indent=2))
        return 0 if found.ok else 1
    heads = ", ".join(map(str, sorted(set(found.num_kv_heads))))
    print(f"{found.destination}: method {found.method}, output {found.output}, {heads} key/value heads")
    print(f"{found.derived} tensors derived from the source, {found.copied} compared with it")
    for name, difference in (found.logits or {}).items():
        print(f"logits, {name.replace('_', ' ')}: {difference:.3g}")
    if found.note:
        print(f"logits: not run: {found.note}")
    for fault in found.faults:
        print(f"BROKEN {fault}")
    print("every promise holds" if found.ok else f"{len(found.faults)} promises are broken")
    return 0 if found.ok else 1
