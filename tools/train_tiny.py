"""Train the byte-level Llama shipped in ``gqa_ext/tiny`` (needs torch and safetensors; one CPU core is enough).

The texts are Bierce's Devil's Dictionary and the Jargon File, both in the public domain, as Debian packages them::

    apt-get install dict-devil dict-jargon
    python tools/train_tiny.py --out gqa_ext/tiny

Every 12th article of each dictionary is held out and never trained on. The script prints, for those held-out bytes,
bits per byte of smoothed Markov models and of the model as written, that is with weights rounded to bfloat16.
The number of steps is fixed and every draw comes from ``--seed``; only the rounding of sums depends on the machine.
Run by hand, by whoever wants to make the model again; tests/test_tiny.py borrows ``bits_per_byte``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_llama import Config, Llama
from tiny_text import DICTIONARIES, Bytes, as_bytes, best_markov_bits, split_texts
from torch import Tensor
from torch.nn import functional as F


def make_optimizers(model: Llama, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks (Jordan et al. 2024) and AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Return the share of the full rate at a step: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


def window_at(step: int, steps: int, longest: int) -> int:
    """Return the window length at a step: a quarter, a half, then all of the longest; short ones cost less per byte."""
    return longest // 4 if step < 0.6 * steps else longest // 2 if step < 0.9 * steps else longest


def draw_batch(data: Tensor, tokens: int, window: int, generator: torch.Generator) -> Tensor:
    """Return random stretches of the text, (tokens // window, window + 1); the last column is only a target."""
    starts = torch.randint(len(data) - window, (tokens // window, 1), generator=generator)
    return data[starts + torch.arange(window + 1)].long()


def loss_of(model: Llama, batch: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of a batch in nats per byte, with matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: Llama, data: Bytes) -> float:
    """Return bits per byte of data in float32, cut into windows that see nothing before their first byte.

    A window of ``max_position_embeddings`` positions reads a newline and then all its bytes but the last.
    """
    window = model.config.max_position_embeddings
    padded = np.concatenate([data, np.zeros(-len(data) % window, np.uint8)]).reshape(-1, window)
    targets = torch.from_numpy(padded.astype(np.int64))
    tokens = torch.cat([torch.full((len(targets), 1), ord("\n")), targets[:, :-1]], 1)
    losses = [
        F.cross_entropy(model(t).flatten(0, 1), y.flatten(), reduction="none")
        for t, y in zip(tokens.split(16), targets.split(16), strict=True)
    ]
    return float(torch.cat(losses)[: len(data)].double().mean() / math.log(2))


def rounded_to_bfloat16(model: Llama) -> Llama:
    """Return a float32 copy of the model whose weights are exactly those that will be written."""
    copy = Llama(model.config)
    copy.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    return copy


def save(model: Llama, folder: Path) -> None:
    """Write model.safetensors (bfloat16) and config.json in Hugging Face's form."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.as_llama(), indent=2) + "\n", encoding="utf-8")


def train(model: Llama, text: Bytes, held_out: Bytes, args: argparse.Namespace) -> None:
    """Train in place for ``args.steps`` steps.

    Every ``args.save_every`` steps the model so far is written, so that a run that is cut short leaves a usable one.
    """
    data, generator = torch.from_numpy(text.copy()), torch.Generator().manual_seed(args.seed)
    optimizers = make_optimizers(model, args.lr)
    longest, started, recent = model.config.max_position_embeddings, time.monotonic(), []
    for step in range(args.steps):
        window = window_at(step, args.steps, longest)
        loss = loss_of(model, draw_batch(data, args.batch_tokens, window, generator))
        loss.backward()
        recent.append(loss.item() / math.log(2))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_factor(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % args.save_every == 0:
            save(model, args.out)
            seconds, seen = time.monotonic() - started, sum(recent) / len(recent)
            print(
                f"step {step + 1}/{args.steps}  {seconds:.0f} s  training {seen:.3f}  "
                f"held out {bits_per_byte(model, held_out[:32768]):.3f} bits per byte (first 32 KiB)",
                flush=True,
            )
            recent.clear()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionaries", nargs="*", type=Path, help=f"two dictd files, default {DICTIONARIES}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write (what is there is replaced)")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1.2e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=400, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Split the texts, train, write, and print what the written model is worth."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training_text, held_out_text = split_texts(tuple(args.dictionaries) or DICTIONARIES)
    text, held_out = as_bytes(training_text), as_bytes(held_out_text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_text(held_out_text, encoding="utf-8", newline="\n")
    model = Llama(Config())
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(text)} training bytes, "
        f"{len(held_out)} held out",
        flush=True,
    )
    train(model, text, held_out, args)
    save(model, args.out)
    print(
        f"held out: {bits_per_byte(model, held_out):.4f} bits per byte as trained, "
        f"{bits_per_byte(rounded_to_bfloat16(model), held_out):.4f} as written"
    )
    for order in (3, 5):
        print(f"held out: {best_markov_bits(text, held_out, order):.4f} bits per byte, Markov model of order {order}")


if __name__ == "__main__":
    main()
