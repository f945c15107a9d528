"""convert_checkpoint: the same bytes from any executor, in bounded memory."""

import importlib.util
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoints import contents, write_config, write_model
from safetensors.numpy import save_file

from gqa_ext.convert import convert_checkpoint


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_model(tmp_path / "src", shards=5)


def check(src: Path, tmp_path: Path, executor: object) -> None:
    """One conversion with the executor, one without."""
    seen: list[tuple[int, int]] = []
    ours = convert_checkpoint(
        src, tmp_path / "dst", 2, executor=executor, progress=lambda done, total: seen.append((done, total))
    )
    plain = convert_checkpoint(src, tmp_path / "plain", 2, progress=False)
    assert contents(tmp_path / "dst") == contents(tmp_path / "plain")
    assert (ours.files, ours.layers) == (plain.files, plain.layers)
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_threads(src, tmp_path) -> None:
    with ThreadPoolExecutor(4) as pool:
        check(src, tmp_path, pool)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(src, tmp_path, method) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        check(src, tmp_path, pool)


def test_dask(src, tmp_path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(2, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        check(src, tmp_path, client)


MPI = """
from mpi4py.futures import MPIPoolExecutor
from gqa_ext.convert import convert_checkpoint
if __name__ == "__main__":
    with MPIPoolExecutor(2) as pool:
        convert_checkpoint({0!r}, {1!r}, 2, executor=pool, progress=False)
"""


@pytest.mark.skipif(not shutil.which("mpiexec") or not importlib.util.find_spec("mpi4py"), reason="no MPI here")
def test_mpi(src, tmp_path) -> None:
    (tmp_path / "run.py").write_text(MPI.format(str(src), str(tmp_path / "dst")))
    command = ["mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", str(tmp_path / "run.py")]
    subprocess.run(command, check=True, timeout=120)
    convert_checkpoint(src, tmp_path / "plain", 2, progress=False)
    assert contents(tmp_path / "dst") == contents(tmp_path / "plain")


class Recorder:
    """An executor of one's own: runs a task twice, by way of pickle."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def submit(self, function, task) -> Future:
        self.names.append(task.name)
        future: Future = Future()
        function, task = pickle.loads(pickle.dumps((function, task)))
        assert function(task) is not None
        future.set_result(pickle.loads(pickle.dumps(function(task))))
        return future


def test_one_task_is_one_shard_picklable_and_idempotent(src, tmp_path) -> None:
    recorder = Recorder()
    convert_checkpoint(src, tmp_path / "dst", 2, executor=recorder, progress=False)
    assert sorted(recorder.names) == sorted(path.name for path in src.glob("*.safetensors"))
    convert_checkpoint(src, tmp_path / "plain", 2, progress=False)
    assert contents(tmp_path / "dst") == contents(tmp_path / "plain")


def test_an_error_of_a_task_ends_the_run_and_waits_for_the_others(src, tmp_path) -> None:
    class Failing(ThreadPoolExecutor):
        def submit(self, function, task):  # type: ignore[override]
            return super().submit(lambda: 1 / 0 if "00003" in task.name else function(task))

    with Failing(2) as pool, pytest.raises(ZeroDivisionError):
        convert_checkpoint(src, tmp_path / "dst", 2, executor=pool, progress=False)
    assert not list(tmp_path.glob(".dst.gqa-ext/*/*.partial"))
    assert not (tmp_path / "dst").exists()
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


MEASURE = """
from gqa_ext.convert import convert_checkpoint
def peak():  # not ru_maxrss, which a process inherits
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
convert_checkpoint({0!r}, {1!r}, 2, max_memory={2}, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts it for us")
@pytest.mark.parametrize("max_memory", [None, 24_000_000, 64_000_000])
@pytest.mark.parametrize("fused", [False, True])
def test_memory_is_bounded(tmp_path, max_memory, fused) -> None:
    src = sparse_model(tmp_path / "src", hidden=4096, fused=fused)
    code = textwrap.dedent(MEASURE).format(str(src), str(tmp_path / "dst"), max_memory)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= (max_memory or 256_000_000)


def sparse_model(folder: Path, hidden: int, fused: bool) -> Path:
    """One layer whose file is mostly holes; a fused projection is larger than any budget."""
    heads = 64
    write_config(folder, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=1)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    shapes = dict.fromkeys(names, (hidden, hidden))
    if fused:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("llama", "phi3"))
        shapes = {"model.layers.0.self_attn.qkv_proj.weight": (3 * hidden, hidden), names[3]: (hidden, hidden)}
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return folder


def test_holes_stay_holes(tmp_path) -> None:
    src = sparse_model(tmp_path / "src", hidden=1024, fused=False)
    convert_checkpoint(src, tmp_path / "dst", 2, progress=False)
    status = (tmp_path / "dst" / "model.safetensors").stat()
    assert status.st_blocks * 512 < status.st_size / 2


def test_many_writers_of_one_file_do_not_meet(tmp_path) -> None:
    """Two attempts at one task at once: both give the same record."""
    from gqa_ext.convert.checkpoint import _tasks, plan_checkpoint
    from gqa_ext.convert.tasks import run_task

    src = write_model(tmp_path / "src")
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    for part in ("files", "done"):
        (tmp_path / "work" / part).mkdir(parents=True)
    tasks = [_tasks(plan_checkpoint(src, 2), str(tmp_path / "work"), 1 << 12)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(run_task, tasks))
    assert len({record.sha256 for record in records}) == 1
    assert [path.name for path in (tmp_path / "work" / "files").iterdir()] == ["model.safetensors"]
