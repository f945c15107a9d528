"""A reader of C just good enough for laws.py: comments, macros, includes, functions.

It assumes code that compiles; #if branches that each open a brace are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SKIPPED = re.compile(
    r"""(?P<kept>\#[ \t]*include[ \t]*"[^"\n]*")
      | //[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""",
    re.DOTALL | re.VERBOSE,
)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
MACRO = re.compile(r"^[ \t]*#[ \t]*define\b(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)
ATTRIBUTE = re.compile(r"__attribute__\s*\(\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)\)")


def blank(match: re.Match[str]) -> str:
    """Spaces in place of the match; line ends stay, so that line numbers do."""
    return re.sub(r"[^\n]", " ", match[0])


def blank_comments(text: str) -> str:
    """The text without comments and without what stands in quotes, names of includes excepted."""
    return SKIPPED.sub(lambda match: match["kept"] or blank(match), text)


def includes(text: str) -> list[str]:
    return INCLUDE.findall(blank_comments(text))


def macros(text: str) -> Iterator[tuple[int, str]]:
    """First line and whole text of every #define."""
    code = SKIPPED.sub(
        lambda match: match["kept"] or blank(match).replace("\n", "\\\n"), text
    )  # a comment does not end one
    for match in MACRO.finditer(code):
        yield code.count("\n", 0, match.start()) + 1, match[0].rstrip("\n")


def function_name(head: str) -> str | None:
    """Name of the function whose body follows head, or None if no body of a function can."""
    head = head.rstrip()
    depth = 0
    for i in range(len(head) - 1, -1, -1) if head.endswith(")") else ():
        depth += (head[i] == ")") - (head[i] == "(")
        if depth == 0:
            words = head[:i].split()
            return words[-1].lstrip("*") if words else None
    return None


def c_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and lines of every function defined in text."""
    code = ATTRIBUTE.sub(blank, DIRECTIVE.sub(blank, blank_comments(text)))
    depth, head_start, name, first = 0, 0, None, 0
    for match in re.finditer(r"[{};]", code):
        depth += (match[0] == "{") - (match[0] == "}")
        if match[0] == "{" and depth == 1:
            head = code[head_start : match.start()]
            name = function_name(head)
            first = code.count("\n", 0, head_start + len(head) - len(head.lstrip())) + 1
        if depth == 0:
            if match[0] == "}" and name is not None:
                yield name, first, code.count("\n", 0, match.start()) + 2 - first
            if match[0] == "}" or match[0] == ";":
                head_start, name = match.end(), None
    if depth != 0:
        raise ValueError("braces do not balance; does an #if branch open one?")
