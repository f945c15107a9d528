"""What a conversion takes, in time and memory, beside copying the same files and beside torch with transformers.

    python benchmarks/conversion.py [--gigabytes 4] [--shards 5] [--rounds 3] [--folder /tmp] [--no-torch]

Makes a Llama of random numbers on disk and converts it from 32 key/value heads to 8. The contenders take turns, each
in a process of its own, and every one ends with its files on disk (fsync). Memory is the peak of the resident set
above that of the process when it has imported what it needs. The source is in the page cache for all of them alike,
as far as it fits. Needs Linux, and three times the size on disk; removes what it made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from gqa_ext.convert.safetensors import TensorInfo, write

HIDDEN, HEADS, INNER, VOCAB, NEW_HEADS = 4096, 32, 11008, 256, 8

FSYNC = """
def fsync(folder):
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())
"""
MEASURE = """
import os, subprocess, sys, time
{imports}
{fsync}
def peak():  # not ru_maxrss, which a process inherits
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
src, dst, started, before = sys.argv[1], sys.argv[2], time.perf_counter(), peak()
{work}
print(time.perf_counter() - started, peak() - before)
"""
TORCH = f"""
config = transformers.AutoConfig.from_pretrained(src)
tensors = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.bfloat16).state_dict()
for name, tensor in tensors.items():
    if "k_proj" in name or "v_proj" in name:
        heads = tensor.view({NEW_HEADS}, {HEADS // NEW_HEADS}, {HIDDEN // HEADS}, {HIDDEN})
        tensors[name] = heads.float().mean(dim=1).to(tensor.dtype).reshape(-1, {HIDDEN})
config.num_key_value_heads = {NEW_HEADS}
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.load_state_dict(tensors, assign=True)
model.save_pretrained(dst, max_shard_size="1GB")
fsync(dst)
"""
CONTENDERS = {
    "cp + fsync": ("", "subprocess.run(['cp', '-rL', '--sparse=never', src, dst], check=True); fsync(dst)"),
    "gqa_ext": (
        "from gqa_ext.convert import convert_checkpoint",
        f"convert_checkpoint(src, dst, {NEW_HEADS}, progress=False)",
    ),
    "torch, transformers": ("import torch, transformers", TORCH),
}


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama, in the order of its file."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        names = f"model.layers.{layer}."
        shapes |= {f"{names}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{names}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{names}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{names}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make_source(folder: Path, gigabytes: float, shards: int) -> int:
    """A model of about this size; returns its bytes."""
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    layers = max(1, round(gigabytes * 1e9 / layer))
    infos = {name: TensorInfo("BF16", shape) for name, shape in shapes_of(layers).items()}
    noise = np.random.default_rng(0).standard_normal(1 << 26, np.float32).astype(ml_dtypes.bfloat16).view(np.uint8)

    def buffers(names: list[str]) -> Iterator[np.ndarray]:
        for i, name in enumerate(names):
            yield noise[2 * i : 2 * i + infos[name].nbytes]

    names, weight_map = list(infos), {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write(folder / file, {name: infos[name] for name in part}, buffers(part), {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(info.nbytes for info in infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": layers,
        "num_key_value_heads": HEADS, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def measure(name: str, src: Path, dst: Path) -> tuple[float, float]:
    """Seconds and bytes of one run, whose result is removed."""
    imports, work = CONTENDERS[name]
    code = MEASURE.format(imports=imports, fsync=FSYNC, work=work)
    run = subprocess.run(
        [sys.executable, "-c", code, str(src), str(dst)], stdout=subprocess.PIPE, text=True, check=True
    )  # fmt: skip
    shutil.rmtree(dst)
    seconds, memory = map(float, run.stdout.split()[-2:])
    return seconds, memory


def main() -> None:
    """Measure and print a table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gigabytes", type=float, default=4)
    options.add_argument("--shards", type=int, default=5)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", help="where to work; the system's temporary folder by default")
    options.add_argument("--no-torch", action="store_true", help="leave out torch, which needs the model in memory")
    args = options.parse_args()
    names = [name for name in CONTENDERS if not (args.no_torch and name.startswith("torch"))]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        src = Path(folder, "src")
        src.mkdir()
        total = make_source(src, args.gigabytes, args.shards)
        runs = [{name: measure(name, src, Path(folder, "dst")) for name in names} for _ in range(args.rounds)]
    print(f"{total / 1e9:.2f} GB in {args.shards} files, {HEADS} to {NEW_HEADS} heads, medians of {args.rounds} rounds")
    print(f"{'':22}{'seconds':>9}{'x cp':>7}{'peak MB':>9}")
    for name in names:
        seconds = statistics.median(run[name][0] for run in runs)
        ratio = statistics.median(run[name][0] / run["cp + fsync"][0] for run in runs)
        print(f"{name:22}{seconds:9.2f}{ratio:7.2f}{max(run[name][1] for run in runs) / 1e6:9.0f}")


if __name__ == "__main__":
    main()
