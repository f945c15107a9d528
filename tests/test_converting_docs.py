"""docs/converting.md: its code runs and prints what it says, its table is the one in the code."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gqa_ext.convert.architectures import ARCHITECTURES, LONE, Layout

DOCS = Path(__file__).resolve().parent.parent / "docs" / "converting.md"
TEXT = DOCS.read_text(encoding="utf-8") if DOCS.is_file() else ""
# Each example, and what is printed where that is shown.
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", TEXT, re.DOTALL)
CLUSTERS = ("distributed", "mpi4py")

pytestmark = pytest.mark.skipif(not TEXT, reason="a source distribution may lack the docs")


def cluster_example(library: str) -> str:
    (code,) = (code for code, _ in EXAMPLES if f"from {library}" in code)
    return code


def test_examples_print_what_is_shown(tmp_path, monkeypatch, capsys) -> None:
    """In the order of the page, as a reader would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "converting"}
    ran = 0
    for code, shown in EXAMPLES:
        if not any(f"from {library}" in code for library in CLUSTERS):
            exec(code, names)
            assert capsys.readouterr().out == shown
            ran += 1
    assert ran >= 8


def test_dask_example(tmp_path, monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    exec(cluster_example("distributed"), {"__name__": "converting"})
    assert (tmp_path / "tiny-dask" / "config.json").is_file()


@pytest.mark.skipif(not shutil.which("mpiexec") or not importlib.util.find_spec("mpi4py"), reason="no MPI here")
def test_mpi_example(tmp_path) -> None:
    (tmp_path / "script.py").write_text(cluster_example("mpi4py"), encoding="utf-8")
    command = ["mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", "script.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "tiny-mpi" / "config.json").is_file()


def quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(name: str, layout: Layout) -> str:
    """A line of the table."""
    projections = [layout.qkv, layout.o] if layout.qkv else [layout.q, layout.k, layout.v, layout.o]
    rows = (layout.fused if layout.qkv else "") + (", transposed" if layout.transposed else "")
    norms = [norm for norm in (layout.q_norm, layout.k_norm) if norm]
    last = f"`{layout.kv_key}`" if layout.kv_key else "expanded only"
    cells = (f"`{name}`", f"`{layout.layer}`", quoted(projections), rows, quoted(norms), last)
    return "| " + " | ".join(cells) + " |"


def test_the_table_is_that_of_the_code() -> None:
    section = TEXT.partition("## Layouts\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| model_type |")
    assert lines[2:] == [row(name, layout) for name, layout in ARCHITECTURES.items()]


def test_the_lone_state_dicts_are_those_of_the_code() -> None:
    named = re.search(r"Known are\s+(.*?)\.\s+It does not", TEXT, re.DOTALL)
    assert named
    assert " ".join(named[1].split()) == "; ".join(f"`{name}`" for name in LONE)
