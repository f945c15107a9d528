"""Choosing the instruction set: testing.use_isa, GQA_ISA and what cpu_info says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gqa_ext import cpu_info, scaled_dot_product_attention, testing


def current() -> str:
    return cpu_info()["isa"]


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {name: text for name, text in os.environ.items() if name != "GQA_ISA"}
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    return subprocess.run(command, env=environ | environment, capture_output=True, text=True, check=False)


def test_names_stand_widest_first_and_end_with_scalar() -> None:
    names = testing.available_isas()
    assert names[-1] == "scalar"
    assert len(set(names)) == len(names)
    assert list(names) == cpu_info()["isa_available"]


def test_cpu_info_is_plain() -> None:
    info = cpu_info()
    assert json.loads(json.dumps(info)) == info
    assert info["num_threads"] >= 1


def test_use_isa_holds_inside_and_is_undone() -> None:
    before = current()
    for name in testing.available_isas():
        with testing.use_isa(name):
            assert current() == name
            with testing.use_isa("scalar"):
                assert current() == "scalar"
            assert current() == name
        assert current() == before


def test_use_isa_is_undone_after_an_exception() -> None:
    before = current()
    with pytest.raises(ZeroDivisionError), testing.use_isa("scalar"):
        raise ZeroDivisionError
    assert current() == before


def test_a_refused_name_changes_nothing() -> None:
    before = current()
    with pytest.raises(ValueError, match="use_isa"), testing.use_isa("sse9"):
        pass
    assert current() == before


def test_use_isa_decorates_and_holds_for_other_threads() -> None:
    seen: list[str] = []

    @testing.use_isa("scalar")
    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()

    look()
    assert seen == ["scalar"]


def test_each_isa_computes() -> None:
    """Instruction sets round differently; were the choice without effect, all would give the same bits."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 4, 70, 64)).astype(np.float32)
    results = []
    for name in testing.available_isas():
        with testing.use_isa(name):
            results.append(scaled_dot_product_attention(query, key, value))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)
    if len(results) > 1:
        assert any((result != results[0]).any() for result in results[1:])


@pytest.mark.parametrize("name", testing.available_isas())
def test_gqa_isa_chooses(name: str) -> None:
    done = in_new_process("import gqa_ext; print(gqa_ext.cpu_info()['isa'])", GQA_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def unasked() -> str:
    """What runs where nobody asks: the widest, but pairs of bfloat16 only where they are fast."""
    cpu = Path("/proc/cpuinfo")
    slow = {"avx512_bf16"} if cpu.exists() and "AuthenticAMD" not in cpu.read_text(encoding="utf-8") else set()
    return next(name for name in testing.available_isas() if name not in slow)


def test_no_gqa_isa_means_the_fastest() -> None:
    for environment in ({}, {"GQA_ISA": ""}):
        done = in_new_process("import gqa_ext; print(gqa_ext.cpu_info()['isa'])", **environment)
        assert done.stdout.strip() == unasked(), done.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX 2", "none"])
def test_a_bad_gqa_isa_stops_the_import(name: str) -> None:
    done = in_new_process("import gqa_ext", GQA_ISA=name)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: import gqa_ext: environment variable GQA_ISA is {name!r}; ")
    assert "set it to one of " + ", ".join(testing.available_isas()) in last
