"""docs/convert.ipynb: runs in a kernel from top to bottom, and shows what is committed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "convert.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="a source distribution may lack the docs")


def shown(notebook) -> list[tuple[str, bool]]:
    """What each code cell printed, and whether it drew; an error would be an output of another type."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert {output.output_type for output in cell.outputs} <= {"stream", "display_data"}
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            drawn = any("image/png" in output.data for output in cell.outputs if output.output_type == "display_data")
            cells.append((printed, drawn))
    return cells


def test_it_runs_and_shows_what_is_committed(tmp_path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    committed = shown(notebook)
    assert any(drawn for _, drawn in committed)
    assert sum("bits per byte" in printed for printed, _ in committed) == 2
    NotebookClient(notebook, kernel_name="python3", timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    assert shown(notebook) == committed
