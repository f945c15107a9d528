"""The tokenizer inside a GGUF file: a byte-level BPE, built with the `tokenizers` package.

Called by gqa_ext.gguf_files.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched whole, before the text is cut
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = ("gpt-2", "smollm", "llama-bpe")  # how the text is cut into words, by llama.cpp's names


def import_extra(name: str) -> ModuleType:
    """A package of the extra `gguf`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'gguf_files.load(): {error}; GGUF files need the package {name}: pip install "gqa-ext[gguf]"'
        ) from None


class GGUFTokenizer:
    """Text to the tokens of a GGUF file's vocabulary, and back; a gqa_ext.tokens.Tokenizer.

    Attributes
    ----------
    eos : frozenset of int
        The tokens of which any ends a text: that of a whole text and, as in llama.cpp, those of a turn and a message.
    """

    def __init__(self, tokenizer: Any, bos: int | None, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        self.eos = eos

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; control tokens such as <|im_start|> are taken for what they are."""
        tokens: list[int] = self._tokenizer.encode(text).ids
        return tokens if self._bos is None else [self._bos, *tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        text: str = self._tokenizer.decode(list(tokens))
        return text

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], vocab_size: int) -> "GGUFTokenizer":
        """Built of a file's metadata, which are to describe `vocab_size` tokens."""
        for key, known in ("model", ("gpt2",)), ("pre", _PRE):
            if metadata.get(_KEY + key) not in known:
                raise NotImplementedError(f"{_KEY}{key} is {metadata.get(_KEY + key)!r:.80}; known: {', '.join(known)}")
        tokens, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
        if len(tokens) != vocab_size or len(set(tokens)) != vocab_size:
            raise ValueError(f"{_KEY}tokens has {len(set(tokens))} different tokens, the embedding {vocab_size}")
        bos, unknown = (_token(metadata, f"{name}_token_id", vocab_size) for name in ("bos", "unknown"))
        ends = (_token(metadata, f"{name}_token_id", vocab_size) for name in ("eos", "eot", "eom"))
        if not metadata.get(_KEY + "add_bos_token", metadata[_KEY + "pre"] == "llama-bpe"):  # llama.cpp's default
            bos = None
        built = _bpe(tokens, merges, metadata[_KEY + "pre"], None if unknown is None else tokens[unknown])
        kinds = metadata.get(_KEY + "token_type", [])
        if not isinstance(kinds, list) or len(kinds) not in (0, vocab_size):
            raise ValueError(f"{_KEY}token_type is {kinds!r:.80}; wanted is a list of {vocab_size}")
        library = import_extra("tokenizers")
        for kind, add in (_CONTROL, built.add_special_tokens), (_USER_DEFINED, built.add_tokens):
            whole = [token for token, its_kind in zip(tokens, kinds, strict=False) if its_kind == kind]
            add([library.AddedToken(token, normalized=False, special=kind == _CONTROL) for token in whole])
        return cls(built, bos, frozenset(token for token in ends if token is not None))


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(_KEY + key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{_KEY}{key} is missing or no list of strings")
    return value


def _token(metadata: dict[str, Any], key: str, vocab_size: int) -> int | None:
    value = metadata.get(_KEY + key)
    if value is None or (type(value) is int and 0 <= value < vocab_size):
        return value
    raise ValueError(f"{_KEY}{key} is {value!r:.80}; wanted is one of {vocab_size} tokens")


def _bpe(tokens: list[str], merges: list[str], pre: str, unknown: str | None) -> Any:
    """The tokenizer without its control tokens."""
    library = import_extra("tokenizers")
    cutters = library.pre_tokenizers
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if unknown is None and not vocabulary.keys() >= set(cutters.ByteLevel.alphabet()):
        raise ValueError(f"{_KEY}tokens lacks some of the 256 bytes, and there is no unknown token to stand for them")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for pair in pairs:
        if not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError(f"{_KEY}merges has {' '.join(pair)!r:.80}, which joins or makes what is no token")
    model = library.models.BPE(vocabulary, pairs, unk_token=unknown, ignore_merges=pre == "llama-bpe")
    built = library.Tokenizer(model)
    # ByteLevel's own expression is GPT-2's
    byte_level = cutters.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    first = {
        "gpt-2": [],
        "smollm": [cutters.Digits(individual_digits=True)],
        "llama-bpe": [cutters.Split(library.Regex(_LLAMA_3), "isolated")],
    }
    built.pre_tokenizer = cutters.Sequence([*first[pre], byte_level])
    built.decoder = library.decoders.ByteLevel()
    return built
