"""The README's Python examples run as printed, and its map names what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MAP = [name for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example):
    exec(example, {})


@pytest.mark.parametrize("name", MAP)
def test_the_map_names_what_is_there(name):
    if name.startswith(".") and not (ROOT / ".ci").is_dir():
        pytest.skip("a source distribution carries no CI")
    assert (ROOT / name).exists()
