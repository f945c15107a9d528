"""The command line: `gqa-ext WORD` or `python -m gqa_ext WORD`.

Each word is a function that takes the parsed arguments and returns an exit code: 0 done, 1 bad input,
2 usage (argparse's own), 130 interrupted.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from ._convert_commands import add_words


def demo(arguments: argparse.Namespace) -> int:
    """Measure MHA, GQA and MQA on the shipped model."""
    from . import demo  # imports only what the word needs, so that --help is quick

    print(demo.run())
    print("\nThe same in a notebook:\n")
    print(textwrap.indent(demo.NOTEBOOK, "  "), end="")
    return 0


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
    add_words(words)
    return parser.parse_args(arguments)


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
