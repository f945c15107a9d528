"""The laws of the house that a machine can check.

    python .ci/laws.py [BUILT_MODULE.so ...]

Prints one line for each breach and the median function length, and exits 1 if
there was a breach.  Every law is a function of the sources, a dict from path to
text, so that tests/test_laws.py can show each one a tree that breaks it.
Called by .ci/run.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import posixpath
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from c_source import blank_comments, c_functions, includes, macros

Sources = dict[str, str]

MAX_FUNCTION_LINES = 60  # of Python functions without the docstring, which is documentation
MAX_FILE_LINES = 400
MAX_MACRO_LINES = 3

C_CODE = ("*.c", "*.h")
CODE = (*C_CODE, "*.py", "*.pyi", "*.sh", ".ci/run")

# file, what it may not include, why
FORBIDDEN_INCLUDES = [
    ("*", "*.c", "sources are compiled, not included"),
    ("*", "Python.h", "only csrc/python knows Python"),
    ("*", "numpy/*", "only csrc/python knows NumPy"),
    ("csrc/gqa.h", "csrc/*", "gqa.h is the bottom of the house"),
    ("csrc/simd/*", "csrc/*", "the words know nothing of the rest"),
    ("csrc/isa/*", "csrc/pool.h", "a kernel computes and does nothing else"),
    ("csrc/*", "csrc/isa/*", "kernels are reached through kernels.h"),
    ("csrc/*", "csrc/simd/*", "kernels are reached through kernels.h"),
    ("csrc/*", "csrc/python/*", "the library does not know Python"),
    ("csrc/*", "tests/*", "the library does not know its tests"),
]
ALLOWED_INCLUDES = [
    ("csrc/python/*", "Python.h"),
    ("csrc/python/*", "numpy/*"),
    ("csrc/simd/*", "csrc/simd/*"),
    ("csrc/simd/*", "csrc/real_*.h"),
    ("csrc/simd/*", "csrc/half.h"),
    ("csrc/isa/*", "csrc/simd/*"),
    ("csrc/python/*", "csrc/python/*"),
]

RUNTIME_IMPORTS = sys.stdlib_module_names | {"gqa_ext", "numpy", "ml_dtypes", "tqdm"}

INTRINSIC = re.compile(
    r"""\b(?: _mm(?:256|512)?_\w+ | __m(?:128|256|512)[di]?\b | __mmask\d+ | __builtin_ia32_\w+
          | v\w+q_(?:\w+_)?[fsup](?:8|16|32|64)
          | v(?:add|cvt|dup|ext|fma|get|ld|max|min|mul|padd|set|st|sub)\w*_[fsup](?:8|16|32|64)
          | (?:float|u?int|poly)\d+x\d+(?:x\d)?_t
          | \w*intrin\.h | arm_(?:neon|sve|acle)\.h )""",
    re.VERBOSE,
)
MACRO_HEAD = re.compile(r"\s*#\s*define\s+\w+(?:\([^)]*\))?")
FUNCTION_IN_MACRO = re.compile(r"[\w#]+[\s*]+([\w#]+)\s*\((?:[^(){};]|\([^()]*\))*\)\s*\{")
OUTSIDE = re.compile(r"\.\./shared|/work/(?:shared|dev|main)")


def select(sources: Sources, *patterns: str) -> Iterator[tuple[str, str]]:
    for path, text in sorted(sources.items()):
        if any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
            yield path, text


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line, and lines less the docstring of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield node.name, node.lineno, lines


def functions(sources: Sources) -> Iterator[tuple[str, str, int, int]]:
    """Path, name, first line and lines of every function."""
    for path, text in select(sources, *C_CODE, "*.py"):
        try:
            yield from ((path, *f) for f in (python_functions if path.endswith(".py") else c_functions)(text))
        except (SyntaxError, ValueError) as error:
            error.add_note(f"in {path}")
            raise


def long_functions(sources: Sources) -> Iterator[str]:
    for path, name, line, lines in functions(sources):
        if lines > MAX_FUNCTION_LINES:
            yield f"{path}:{line}: function {name} has {lines} lines, {MAX_FUNCTION_LINES} are allowed"


def long_files(sources: Sources) -> Iterator[str]:
    for path, text in select(sources, *CODE):
        lines = text.count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{path}: {lines} lines, {MAX_FILE_LINES} are allowed"


def long_macros(sources: Sources) -> Iterator[str]:
    for path, text in select(sources, *C_CODE):
        for line, body in macros(text):
            lines = body.count("\n") + 1
            if lines > MAX_MACRO_LINES:
                yield f"{path}:{line}: macro of {lines} lines, {MAX_MACRO_LINES} are allowed"


def functions_in_macros(sources: Sources) -> Iterator[str]:
    control = {"if", "for", "while", "switch", "return"}
    for path, text in select(sources, *C_CODE):
        for line, body in macros(text):
            replacement = MACRO_HEAD.sub("", body.replace("\\\n", " "), count=1)
            if set(FUNCTION_IN_MACRO.findall(replacement)) - control:
                yield f"{path}:{line}: a function body in a macro"


def intrinsics_outside_simd(sources: Sources) -> Iterator[str]:
    for path, text in select(sources, *C_CODE):
        if path.startswith("csrc/simd/"):
            continue
        for number, line in enumerate(blank_comments(text).split("\n"), 1):
            if found := INTRINSIC.search(line):
                yield f"{path}:{number}: {found[0]} outside csrc/simd/"


def include_graph(sources: Sources) -> dict[str, list[str]]:
    """For each C file what it includes: paths where the file is ours, names where not."""
    graph = {}
    for path, text in select(sources, *C_CODE):
        places = [posixpath.dirname(path), "csrc"]
        candidates = [
            [name, *(posixpath.normpath(posixpath.join(place, name)) for place in places)] for name in includes(text)
        ]
        graph[path] = [next((c for c in reversed(names) if c in sources), names[0]) for names in candidates]
    return graph


def import_graph(sources: Sources) -> dict[str, list[str]]:
    """For each file of gqa_ext/ the modules it imports, at its top or inside a function."""
    return {path: list(imports(path, text)) for path, text in select(sources, "gqa_ext/*.py")}


def imports(path: str, text: str) -> Iterator[str]:
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if node.module:
                yield base
            if node.level:  # what `from . import x` and `from .a import x` name may be a module
                yield from (f"{base}.{alias.name}" for alias in node.names)


def circles(sources: Sources) -> Iterator[str]:
    modules = {p.removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in import_graph(sources)}
    python = {path: [modules.get(name, name) for name in names] for path, names in import_graph(sources).items()}
    for graph, word in (include_graph(sources), "include"), (python, "import"):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            yield f"{word} circle: " + " <- ".join(error.args[1])


def upward_includes(sources: Sources) -> Iterator[str]:
    for path, names in include_graph(sources).items():
        for name in names:
            if any(fnmatch.fnmatch(path, file) and fnmatch.fnmatch(name, what) for file, what in ALLOWED_INCLUDES):
                continue
            for file, what, why in FORBIDDEN_INCLUDES:
                if fnmatch.fnmatch(path, file) and fnmatch.fnmatch(name, what):
                    yield f"{path}: includes {name}: {why}"


def foreign_imports(sources: Sources) -> Iterator[str]:
    for path, names in import_graph(sources).items():
        for name in names:
            if name.partition(".")[0] not in RUNTIME_IMPORTS:
                yield f"{path}: imports {name}, which is no run-time dependency"
    for path, text in select(sources, "tests/reference.py"):
        if any(name.startswith("gqa_ext") for name in imports(path, text)):
            yield f"{path}: the oracle imports what it judges"


def mentions_outside(sources: Sources) -> Iterator[str]:
    for path, text in sorted(sources.items()):
        for number, line in enumerate(text.split("\n"), 1):
            if found := OUTSIDE.search(line):
                yield f"{path}:{number}: mentions {found[0]}, which is not part of the repository"


def exported_symbols(module: Path) -> Iterator[str]:
    """Names that a built module shows to the rest of the process, beyond PyInit_*."""
    listing = subprocess.run(["nm", "-D", "--defined-only", module], check=True, capture_output=True, text=True)
    for line in listing.stdout.splitlines():
        name = line.split()[-1]
        if not name.startswith("PyInit_"):
            yield f"{module.name}: exports {name}"


LAWS: list[Callable[[Sources], Iterator[str]]] = [
    long_functions,
    long_files,
    long_macros,
    functions_in_macros,
    intrinsics_outside_simd,
    circles,
    upward_includes,
    foreign_imports,
    mentions_outside,
]


def read_sources(root: Path) -> Sources:
    """Every text file that git tracks or would track."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    sources = {}
    for name in filter(None, listing.stdout.split("\0")):
        try:
            sources[name] = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted and not yet committed
            continue
    return sources


def print_medians(sources: Sources) -> None:
    lengths = [(path, lines) for path, _, _, lines in functions(sources)]
    for title, pattern in ("C", "csrc/*"), ("Python", "gqa_ext/*"), ("tests", "tests/*"), ("everything", "*"):
        chosen = [lines for path, lines in lengths if fnmatch.fnmatch(path, pattern)]
        if chosen:
            print(f"median function, {title}: {statistics.median(chosen):g} lines of {len(chosen)}")


def main() -> int:
    sources = read_sources(Path(__file__).resolve().parent.parent)
    breaches = [breach for law in LAWS for breach in law(sources)]
    breaches += [breach for module in sys.argv[1:] for breach in exported_symbols(Path(module))]
    print(*breaches, sep="\n", end="\n" if breaches else "")
    print_medians(sources)
    print(f"{len(LAWS) + bool(sys.argv[1:])} laws, {len(breaches)} breaches")
    return bool(breaches)


if __name__ == "__main__":
    sys.exit(main())
