"""The text of the shipped model, its split, and the Markov models it has to beat (NumPy only).

Reads dictionaries as Debian's dict-devil and dict-jargon packages install them: a gzip-compatible ``.dict.dz`` file
with dictd's ``.index`` beside it. Called by train_tiny.py and tests/test_tiny.py.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int64]
DICTIONARIES = (Path("/usr/share/dictd/devil.dict.dz"), Path("/usr/share/dictd/jargon.dict.dz"))
HELD_OUT_EVERY = 12
BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
TYPOGRAPHY = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "·": None, "\xa0": " "}
)


def decode_base64(digits: str) -> int:
    """Return the number that dictd writes in its index as base-64 digits, most significant first."""
    number = 0
    for digit in digits:
        number = number * 64 + BASE64[digit]
    return number


def tidy(article: str) -> str:
    """Unwrap hard-wrapped prose, and spell quotes, dashes and blanks in ASCII.

    A line without indentation continues the line above; an indented one (verse, listings) keeps its break. The Jargon
    File, known by the line of pronunciation (or nothing) below its headword, indents all prose by four blanks, which
    go first.
    """
    article = article.translate(TYPOGRAPHY)
    if re.match(r".*\n( \S.*)?\n\n {4}", article):
        article = re.sub(r"^ {4}", "", article, flags=re.M)
    lines: list[str] = []
    for line in article.splitlines():
        line = re.sub(r"^ {5,}", "    ", line.rstrip())
        if line and lines and lines[-1] and not line.startswith(" "):
            lines[-1] += " " + line
        elif line or (lines and lines[-1]):
            lines.append(line)
    return re.sub(r"\{ ", "{", "\n".join(lines)).strip()


def read_articles(path: Path) -> list[str]:
    """Return a dictionary's tidied articles in file order, each once, without dictd's own ``00database`` pages."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: apt-get install dict-devil dict-jargon, or pass the two files' paths")
    data = gzip.decompress(path.read_bytes())
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in index.splitlines() if not line.startswith("00")]
    spans = sorted({(decode_base64(start), decode_base64(length)) for _, start, length in rows})
    return list(dict.fromkeys(tidy(data[start : start + length].decode("utf-8")) for start, length in spans))


def split_texts(paths: tuple[Path, ...], every: int = HELD_OUT_EVERY) -> tuple[str, str]:
    """Return (training text, held-out text); the last of every ``every`` articles of each file is held out."""
    train: list[str] = []
    held_out: list[str] = []
    for path in paths:
        for number, article in enumerate(read_articles(path)):
            (held_out if number % every == every - 1 else train).append(article)
    return "\n\n".join(train) + "\n", "\n\n".join(held_out) + "\n"


def as_bytes(text: str) -> Bytes:
    """Return the UTF-8 bytes of text, shape (n,), uint8."""
    return np.frombuffer(text.encode(), np.uint8)


# ---- the Markov model to beat ----------------------------------------------------------------------------------------


def context_codes(data: Bytes, order: int) -> Codes:
    """Return the ``order`` bytes before each byte of data as one base-256 number; newlines precede the text."""
    padded = np.concatenate([np.full(order, ord("\n"), np.uint8), data]).astype(np.int64)
    codes = np.zeros(len(data), np.int64)
    for step in range(order):
        codes = codes * 256 + padded[step : step + len(data)]
    return codes


def lookup(keys: Codes, counts: Codes, wanted: Codes) -> Codes:
    """Return ``counts`` at the places where sorted ``keys`` equal ``wanted``, 0 where a wanted key is absent."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, counts[at], 0)


def markov_bits(train: Bytes, held_out: Bytes, order: int, discount: float) -> float:
    """Return bits per byte of an interpolated Markov model with absolute discounting (Ney, Essen and Kneser 1994).

    Each order gives what the discount takes away to the next lower one, down to 1/256 for every byte.
    """
    probability = np.full(len(held_out), 1 / 256)
    for k in range(order + 1):
        context, wanted = context_codes(train, k), context_codes(held_out, k)
        pairs, pair_counts = np.unique(context * 256 + train, return_counts=True)
        contexts, totals = np.unique(context, return_counts=True)
        kinds = np.unique(pairs >> 8, return_counts=True)[1]
        seen = lookup(pairs, pair_counts, wanted * 256 + held_out)
        total = lookup(contexts, totals, wanted)
        given_up = discount * lookup(contexts, kinds, wanted)
        mixed = (np.maximum(seen - discount, 0.0) + given_up * probability) / np.maximum(total, 1)
        probability = np.where(total > 0, mixed, probability)
    return float(-np.log2(probability).mean())


def best_markov_bits(train: Bytes, held_out: Bytes, order: int) -> float:
    """Return the order's best bits per byte; the discount is chosen on the held-out text itself, in its favour."""
    return min(markov_bits(train, held_out, order, discount) for discount in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9))
