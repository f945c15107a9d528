"""The package as it is installed: what it carries, what importing it loads, and how a clone finds it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import gqa_ext

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path(gqa_ext._core.__file__).resolve().parent


def python(*arguments: str | Path, cwd: Path, path: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """A new interpreter in a folder; PYTHONPATH is this process's sys.path unless given."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("GQA_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path if path is None else path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with an unbuilt gqa_ext/, as the root of a clone is."""
    unbuilt = shutil.ignore_patterns("_core.*.so", "_core.so", "_core.*.pyd", "__pycache__")
    shutil.copytree(INSTALLED, tmp_path / "clone" / "gqa_ext", ignore=unbuilt)
    return tmp_path / "clone"


def test_a_deleted_working_directory_is_no_hindrance(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    first = "import os, sys, numpy, ml_dtypes"  # NumPy itself cannot be imported there under Python 3.13.0
    done = python("-c", f"{first}; sys.path.insert(0, ''); os.rmdir({str(gone)!r}); import gqa_ext", cwd=gone)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi", "tiny/config.json", "tiny/model.safetensors"])
def test_data_files_are_installed(name: str) -> None:
    assert (INSTALLED / name).is_file()


def test_import_loads_run_time_dependencies_only(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import gqa_ext; print(*set(sys.modules) - before)"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    # NumPy's own compiled parts bring Cython's run time with them
    foreign = {name for name in loaded if "cython" not in name and not name.startswith("_")}
    assert foreign <= {"gqa_ext", "numpy", "ml_dtypes", "tqdm"}


def test_an_unbuilt_clone_takes_the_installed_modules(clone: Path) -> None:
    code = "import gqa_ext, gqa_ext.attention as a; print(gqa_ext._core.__file__, a.__file__)"
    done = python("-c", code, cwd=clone)
    assert done.returncode == 0, done.stderr
    core, attention = done.stdout.split()
    assert Path(core).parent == Path(attention).parent == INSTALLED


def test_the_command_runs_in_an_unbuilt_clone(clone: Path) -> None:
    done = python("-m", "gqa_ext", "--help", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_an_unbuilt_clone_works_under_multiprocessing(clone: Path) -> None:
    (clone / "work.py").write_text(
        "import multiprocessing, gqa_ext\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(gqa_ext.kv_cache_nbytes, (1, 1, 1, 1)))\n"
    )
    done = python("work.py", cwd=clone)
    assert done.stdout.strip() == "4", done.stderr


def test_an_unbuilt_clone_says_what_to_do(clone: Path) -> None:
    done = python("-S", "-c", "import gqa_ext", cwd=clone, path=[])  # -S: no installed packages
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: import gqa_ext: {clone / 'gqa_ext'} is the source folder and holds no ")
    assert last.endswith(f"run `python -m pip install .` in {clone}")


def test_the_console_script_is_there() -> None:
    try:
        scripts = importlib.metadata.distribution("gqa-ext").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gqa_ext runs from a folder and is not installed")
    (script,) = scripts.select(group="console_scripts")
    assert (script.name, script.value) == ("gqa-ext", "gqa_ext.__main__:main")
    assert importlib.metadata.version("gqa-ext") == gqa_ext.__version__


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="there is no setup.py beside the tests")
def test_the_source_distribution_holds_what_a_build_and_the_tests_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools makes the source distribution")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=skipped)
    folders = [source / name for name in ("csrc", "gqa_ext", "tests", "tools", "benchmarks")]
    wanted = [path.relative_to(source).as_posix() for folder in folders for path in folder.rglob("*.*")]
    done = python("setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert sorted(set(wanted) - held) == []
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= held


@pytest.mark.skipif(not shutil.which("nm"), reason="nm lists the symbols")
@pytest.mark.skipif(sysconfig.get_config_var("EXT_SUFFIX").endswith(".pyd"), reason="not an ELF or Mach-O file")
def test_only_the_init_function_is_exported() -> None:
    listing = subprocess.run(["nm", "-D", "--defined-only", gqa_ext._core.__file__], capture_output=True, text=True)
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert [name for name in names if not name.startswith("_")] == ["PyInit__core"]
