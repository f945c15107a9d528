"""Text to tokens and back.

A tokenizer here has three things: encode(text), decode(tokens) and eos, the tokens of which any ends a text.
Called by gqa_ext.generate and by users who give a model text.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

__all__ = ["ByteTokenizer", "JsonTokenizer", "Tokenizer", "load_tokenizer", "stream_text"]


class Tokenizer(Protocol):
    """What a tokenizer has."""

    @property
    def eos(self) -> frozenset[int]:
        """The tokens of which any ends a text."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that the model wants at its beginning."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without those that stand for no text."""


class ByteTokenizer:
    """A token is a byte of UTF-8, as in the model shipped with this package.

    Parameters
    ----------
    eos : iterable of int, optional
        The bytes of which any ends a text.

    Examples
    --------
    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    >>> ByteTokenizer().decode([110, 195, 169])
    'né'
    """

    def __init__(self, eos: Iterable[int] = ()) -> None:
        self.eos = frozenset(eos)

    def encode(self, text: str) -> list[int]:
        """Bytes of a text; those that a command line could not decode as they came (PEP 383)."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes; U+FFFD for what is no UTF-8."""
        return bytes(tokens).decode("utf-8", "replace")


class JsonTokenizer:
    """A tokenizer.json, by Hugging Face's `tokenizers` library.

    Parameters
    ----------
    path : pathlib.Path
        The file. eos is, of the files beside it, the eos_token_id of generation_config.json, or else of config.json,
        which transformers' generate stops at, or else the eos_token of tokenizer_config.json.

    Raises
    ------
    ImportError
        `tokenizers` is not installed; the message has the command.
    ValueError
        The file is broken.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = import_module("tokenizers").Tokenizer
        except ImportError:
            message = f'{path} needs the package tokenizers; install it with: pip install "gqa-ext[generate]"'
            raise ImportError(message) from None
        content = path.read_bytes()
        try:
            self._library = library.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"JsonTokenizer(): {path}: {error}") from None
        self.eos = _find_eos(path.parent) or self._named_eos(path.parent)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that tokenizer.json puts at its beginning."""
        tokens: list[int] = self._library.encode(text).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without the special ones."""
        text: str = self._library.decode(list(tokens))
        return text

    def _named_eos(self, folder: Path) -> frozenset[int]:
        name = _setting(folder / "tokenizer_config.json", "eos_token")
        if isinstance(name, dict):  # an added token, written out
            name = name.get("content")
        token = self._library.token_to_id(name) if isinstance(name, str) else None
        return frozenset() if token is None else frozenset([token])


def _find_eos(folder: Path) -> frozenset[int]:
    """Which transformers' generate stops at: those of generation_config.json, or else of config.json."""
    for file in ("generation_config.json", "config.json"):
        given = _setting(folder / file, "eos_token_id")
        numbers = given if isinstance(given, list) else [given]
        tokens = frozenset(number for number in numbers if type(number) is int)
        if tokens:
            return tokens
    return frozenset()


def _setting(path: Path, key: str) -> Any:
    """One key of a JSON file; None where the file or the key is missing."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_tokenizer(): {path}: no sound UTF-8 JSON: {error}") from None
    return given.get(key) if isinstance(given, dict) else None


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model's folder: its tokenizer.json, or bytes for a model of 256 tokens without one."""
    path = folder / "tokenizer.json"
    if path.exists():
        return JsonTokenizer(path)
    if vocab_size == 256:
        return ByteTokenizer(_find_eos(folder))
    message = f"{path} is missing, and the model has {vocab_size} tokens, not the 256 bytes"
    raise FileNotFoundError(f"{message}: put the tokenizer.json of the model beside its config.json")


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; their parts joined are the text of them all behind the prompt.

    A character whose tokens have not all come decodes to U+FFFD at the end, and waits for the next. New tokens are
    decoded behind those before them, as some tokenizers drop a space at the beginning of a text.

    Examples
    --------
    >>> list(stream_text(ByteTokenizer(), [32], [110, 195, 169, 33]))
    ['n', 'é', '!']
    """
    shown, waiting = list(prompt), []
    before = text = tokenizer.decode(shown)
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(shown + waiting)
        if not text.endswith("\ufffd"):
            yield text[len(before) :]
            shown, waiting = waiting, []
            before = tokenizer.decode(shown)
            text = before
    if len(text) > len(before):
        yield text[len(before) :]
