"""A model continues a text: `gqa-ext generate`.

Finds model and tokenizer at a path, writes the text as it comes, and then what it took: tokens per second, for
the prompt and for each new token, and the bytes of keys and values.

Called by gqa_ext.__main__.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from . import gguf_files
from .convert.source import PICKLES, refuse_pickle
from .llama import TINY, Llama, load
from .tokens import Tokenizer, load_tokenizer, stream_text

__all__ = ["Timing", "open_model", "run"]


@dataclass
class Timing:
    """When tokens came, and what their keys and values take.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    prefill_seconds : float
        Until the first new token.
    decode_seconds : float
        From the first new token to the last.
    kv_bytes_per_token, kv_bytes : int
        Of all layers, with the scales of int8; for one token, and for the whole cache.
    kv_dtype : str
    """

    prompt_tokens: int
    kv_bytes_per_token: int
    kv_bytes: int
    kv_dtype: str
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"prefill  {_rate(self.prompt_tokens, self.prefill_seconds)}\n"
            f"decode   {_rate(max(0, self.new_tokens - 1), self.decode_seconds)}\n"
            f"KV cache {self.kv_bytes_per_token:,} bytes per token, {self.kv_bytes:,} bytes in all, {self.kv_dtype}"
        )

    def watch(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens, timed; what is done with them between is not."""
        while True:
            start = time.perf_counter()
            token = next(tokens, None)
            seconds = time.perf_counter() - start
            if token is None:
                return
            if self.new_tokens:
                self.decode_seconds += seconds
            else:
                self.prefill_seconds = seconds
            self.new_tokens += 1
            yield token


def _rate(count: int, seconds: float) -> str:
    """A first new token belongs to the prompt's time, so that one new token decodes nothing."""
    return f"{count} tokens, {count / seconds:,.1f} tokens per second" if count else "0 tokens"


def open_model(path: str) -> tuple[Llama, Tokenizer]:
    """Model and tokenizer of a folder, of a .gguf file, or of the word "tiny": the model in this package."""
    if path.lower().endswith(".gguf") and not Path(path).is_dir():
        return gguf_files.load(path)
    folder = TINY if path == "tiny" else Path(path)
    if folder.name.endswith(PICKLES) and folder.is_file():
        refuse_pickle(folder, "generate()")
    if not folder.is_dir():
        beside = f": pass its folder, {str(folder.parent)!r}" if folder.exists() else ""
        raise FileNotFoundError(f"{path!r} is neither a folder nor a .gguf file nor 'tiny'{beside}")
    model = load(folder)
    return model, load_tokenizer(folder, model.config.vocab_size)


def run(
    path: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, kv_dtype: str,
    num_kv_heads: int | None,
) -> Iterator[str]:  # fmt: skip
    """The prompt, its continuation piece by piece, and a few lines of figures; see `gqa-ext generate --help`."""
    model, tokenizer = open_model(path)
    if num_kv_heads is not None:
        model = model.pooled(num_kv_heads)
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("the prompt has no tokens; give at least one with --prompt")
    cache = model.cache_for(len(tokens), max_new_tokens, kv_dtype)
    one_token = sum(layer.nbytes for layer in model.new_cache(1, dtype=kv_dtype))
    timing = Timing(len(tokens), one_token, 0, kv_dtype)
    made = model.generate(tokens, max_new_tokens, temperature=temperature, seed=seed, cache=cache)
    yield prompt
    yield from stream_text(tokenizer, tokens, takewhile(lambda token: token not in tokenizer.eos, timing.watch(made)))
    timing.kv_bytes = sum(layer.nbytes for layer in cache)  # a ring has grown with the prompt
    yield f"\n\n{timing}\n"
    most = model.config.max_position_embeddings
    if len(tokens) + timing.new_tokens > most:
        yield f"note     the model's config promises {most:,} tokens; what lies behind them may be worse\n"
