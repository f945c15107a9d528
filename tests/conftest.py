"""What all tests share: the isa fixture, the quick marker, and the worst errors in the summary."""

from __future__ import annotations

import os
from collections.abc import Iterator

# The oracle's products are small, and OpenBLAS's threads spin where cores are few.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import bounds
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the small subset that sanitizers and emulators run (-m quick)")


@pytest.hookimpl(trylast=True)  # after the marks, so that the instruction sets take turns at each case
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for the isa fixture runs on every instruction set this CPU has."""
    if "isa" in metafunc.fixturenames:
        from gqa_ext import testing

        metafunc.parametrize("isa", testing.available_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the instruction set in use."""
    from gqa_ext import testing

    with testing.use_isa(request.param):
        yield request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest error of this run as a share of the bound in bounds.py."""
    if not bounds.worst:
        return
    terminalreporter.section("largest error / bound against the float64 oracle (bounds.py)")
    for (isa, dtype, what), ratio in sorted(bounds.worst.items()):
        terminalreporter.write_line(f"{isa:8} {dtype:8} {what:4} {ratio:.3f}")
