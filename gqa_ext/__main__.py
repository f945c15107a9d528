"""The command line: `gqa-ext WORD` or `python -m gqa_ext WORD`.

Each word is a function that takes the parsed arguments and returns an exit code: 0 done, 1 bad input,
2 usage (argparse's own), 130 interrupted.
"""

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from ._convert_commands import add_words, one_line


def demo(arguments: argparse.Namespace) -> int:
    """Measure MHA, GQA and MQA on the shipped model."""
    from . import demo  # imports only what the word needs, so that --help is quick

    print(demo.run())
    print("\nThe same in a notebook:\n")
    print(textwrap.indent(demo.NOTEBOOK, "  "), end="")
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure MHA, GQA and MQA at the size of a real model."""
    from . import bench
    from ._figures import check_picture

    sizes = bench.Sizes(rounds=2, prefill=512, contexts=(1024, 4096)) if arguments.quick else bench.Sizes()
    refusals = (ImportError, OSError, ValueError)
    try:
        if arguments.plot is not None:
            check_picture("gqa-ext bench", arguments.plot)  # before minutes are spent
    except refusals as error:
        return refused("bench", error)
    result = bench.run(sizes)
    print(result.markdown() if arguments.markdown else result)
    try:
        if arguments.plot is not None:
            result.plot(arguments.plot)
    except refusals as error:
        return refused("bench", error)
    return 0


def refused(word: str, error: Exception) -> int:
    """Say so; the exit code."""
    print(f"gqa-ext {word}: {one_line(error)}", file=sys.stderr)
    return 1


def generate(arguments: argparse.Namespace) -> int:
    """Continue a text, and show what it took."""
    from . import generate

    options = {name: setting for name, setting in vars(arguments).items() if name != "run"}
    try:
        for piece in generate.run(**options):
            show(piece)
    except BrokenPipeError:
        raise
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError, MemoryError) as error:
        return refused("generate", error)
    return 0


def show(piece: str) -> None:
    """Print a piece of text at once; what the terminal's encoding lacks is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(piece.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


Number = TypeVar("Number", int, float)


def at_least(least: Number) -> Callable[[str], Number]:
    """What reads an int, or a finite float, of the command line; argparse puts the argument's name before a message."""
    noun = "a whole number" if isinstance(least, int) else "a finite number"

    def read(text: str) -> Number:
        with suppress(ValueError):
            number = type(least)(text)
            if least <= number < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} was given; {noun} of at least {least:g} was wanted")

    return read


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; on a wrong one print the usage and exit with 2."""
    parser = argparse.ArgumentParser("gqa-ext", description="Grouped-query attention on NumPy arrays.")
    words = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    word = words.add_parser(
        "demo",
        help="measure MHA, GQA and MQA on the shipped model, on this machine",
        description="Pool the shipped multi-head model to fewer key/value heads and measure each: parameters, "
        "cache bytes, decode time, bits per byte. Takes seconds; needs no network and writes no file.",
    )
    word.set_defaults(run=demo)
    word = words.add_parser(
        "bench",
        help="the table of MHA, GQA and MQA at the size of a real model, on this machine",
        description="For each number of key/value heads: parameters, cache bytes, prefill time and decode time of a "
        "large layer, and the shipped model's bits per byte. Takes half a minute and 2 GB of memory.",
    )
    word.add_argument("--markdown", action="store_true", help="print the tables for a README")
    word.add_argument("--plot", metavar="FILE", help='draw them too (.svg, .png; needs pip install "gqa-ext[plot]")')
    word.add_argument("--quick", action="store_true", help="shorter contexts, fewer rounds")
    word.set_defaults(run=bench)
    add_generate(words)
    add_words(words)
    return parser.parse_args(arguments)


def add_generate(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The word `generate`."""
    word = words.add_parser(
        "generate",
        help="continue a text with the shipped model, a Hugging Face folder or a .gguf file",
        description="Continue a text with a Llama-like model (Llama, Mistral, Qwen2, Qwen3). The text is shown as it "
        "comes, then tokens per second and the bytes of keys and values.",
    )
    word.add_argument(
        "path", metavar="PATH", nargs="?", default="tiny",
        help="a folder with config.json and safetensors, a .gguf file, or tiny, the model in this package (default)",
    )  # fmt: skip
    word.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    word.add_argument(
        "--max-new-tokens", type=at_least(1), default=200, metavar="N", help="at most so many (default 200)"
    )
    word.add_argument(
        "--temperature", type=at_least(0.0), default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    word.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the sampling (default 0)")
    word.add_argument(
        "--kv-dtype", choices=("float32", "float16", "bfloat16", "int8"), default="float32",
        help="what keys and values are kept in (default float32)",
    )  # fmt: skip
    word.add_argument(
        "--num-kv-heads", type=at_least(1), metavar="H", help="pool the key/value heads to so many, by their mean"
    )
    word.set_defaults(run=generate)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parsed = parse(arguments)
    try:
        code: int = parsed.run(parsed)
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, as in `gqa-ext demo | head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
