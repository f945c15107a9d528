"""A model that generates: with caches as without, every cache dtype, and the command as a stranger runs it."""

import dataclasses
import doctest
import json
import os
import re
import subprocess
import sys

import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16)
import numpy as np
import pytest

from gqa_ext import __main__, generate, llama, tokens
from gqa_ext.tokens import ByteTokenizer, JsonTokenizer, load_tokenizer, stream_text

STEPS = 200
PROMPTS = ["The dictionary", "HOPE, n.  ", "LOVE, n. "]


@pytest.fixture(scope="module")
def tiny() -> llama.Llama:
    return llama.load()


def rounding(model: llama.Llama, dtype: str) -> llama.Llama:
    """The model without a cache, its keys and values rounded as a cache of dtype does."""

    def attention(query, key, value, **rules):
        key, value = (x.astype(dtype).astype(np.float32) for x in (key, value))
        return model.attention(query, key, value, **rules)

    return dataclasses.replace(model, attention=attention)


def cached_logits(model: llama.Llama, tokens: list[int], prompt: int, dtype: str) -> tuple[np.ndarray, tuple]:
    """Logits behind the prompt and behind each token after it, and the caches."""
    cache = model.new_cache(len(tokens), dtype=dtype)
    rows = [model.forward(tokens[:prompt], cache)[-1]]
    rows += [model.forward([token], cache)[-1] for token in tokens[prompt:-1]]
    return np.array(rows), cache


# Where an uncached pass over a whole text has its argmax at the next token, at every step, greedy decoding
# without a cache takes the same steps: one pass shows 200 of them.


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_greedy_steps_with_a_cache_are_those_without(tiny, prompt, dtype):
    made = list(tiny.generate(prompt, STEPS, kv_dtype=dtype))
    uncached = rounding(tiny, dtype).forward([*prompt.encode(), *made])[len(prompt) - 1 : -1]
    assert uncached.argmax(-1).tolist() == made
    assert len(made) == STEPS


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-6), ("float16", 5e-4), ("bfloat16", 3e-3), ("int8", 1e-2)])
def test_rounded_caches_move_logits_as_little_as_is_said(tiny, prompt, dtype, share):
    """The shares of the range are those of new_cache's docstring. Other tokens come only of a near tie."""
    tokens = [*prompt.encode(), *tiny.generate(prompt, STEPS)]
    exact = tiny.forward(tokens)[len(prompt) - 1 : -1]
    got, _ = cached_logits(tiny, tokens, len(prompt), dtype)
    bound = share * np.ptp(exact)
    assert np.abs(got - exact).max() < bound
    top = np.sort(exact, axis=-1)
    is_clear = top[:, -1] - top[:, -2] > 2 * bound
    assert is_clear.sum() > STEPS / 2
    np.testing.assert_array_equal(got.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounded_caches_hold_what_they_say(tiny, dtype):
    """The first layer sees the same input in every dtype, so its rows are those of float32, rounded once."""
    tokens = list(b"The dictionary of the devil")
    (first, *_), (exact, *_) = (cached_logits(tiny, tokens, 5, name)[1] for name in (dtype, "float32"))
    for got, scales, want in (
        (first.keys, first.key_scales, exact.keys),
        (first.values, first.value_scales, exact.values),
    ):
        rows = got.astype(np.float32)
        bits = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 254}[dtype]
        rows = rows if scales is None else rows * scales[..., None]
        assert (np.abs(rows - want) <= bits * 1.0001 * np.abs(want).max(-1, keepdims=True)).all()
        assert (rows != want).any()


def test_a_given_cache_is_gone_on_from(tiny):
    cache = tiny.new_cache(60)
    start = list(tiny.generate("The dictionary", 20, cache=cache))
    assert cache[0].lengths.tolist() == [14 + 19]
    more = list(tiny.generate(start[-1:], 20, cache=cache))
    assert start + more == list(tiny.generate("The dictionary", 40))


@pytest.mark.parametrize("module", [llama, tokens], ids=lambda module: module.__name__)
def test_examples_run(module):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


# ---- tokenizers ----


@pytest.mark.parametrize("text", ["plain", "né 日本 🙂", "a\x00b", "\udce9t\udcff"])
def test_bytes_come_back(text):
    tokens = ByteTokenizer().encode(text)
    assert bytes(tokens) == text.encode("utf-8", "surrogateescape")
    assert ByteTokenizer().decode(tokens) == text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("né 日🙂!".encode(), ["n", "é", " ", "日", "🙂", "!"]),
        (b"a\xe9t", ["a", "\ufffdt"]),
        ("a🙂".encode()[:-1], ["a", "\ufffd"]),
    ],
)
def test_streamed_parts_are_whole_characters(given, parts):
    assert list(stream_text(ByteTokenizer(), ByteTokenizer().encode("é "), given)) == parts


@pytest.fixture
def word_folder(tmp_path):
    """A tokenizer.json of whole words, whose decoder drops the space before the first."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "s": 4, "<unk>": 5}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_json(word_folder):
    tokenizer = load_tokenizer(word_folder, 6)
    assert tokenizer.encode("the cat") == [0, 2, 3]
    assert tokenizer.decode([0, 2, 3, 1]) == "the cat"
    assert list(stream_text(tokenizer, [0, 2], [3, 2, 1])) == [" cat", " the", ""]


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 4}}, {4}),
        ({"config.json": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"config.json": {"eos_token_id": 4}, "generation_config.json": {"eos_token_id": [3, 1]}}, {3, 1}),
        ({"config.json": {"eos_token_id": [4]}, "generation_config.json": {"eos_token_id": 0}}, {0}),
        ({"config.json": {"eos_token_id": 4}, "generation_config.json": {"eos_token_id": None}}, {4}),
        ({"config.json": {"eos_token_id": 4}, "tokenizer_config.json": {"eos_token": "</s>"}}, {4}),
        ({"tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}}}, {1}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {"eos_token": "</s>"}}, {1}),
        ({"config.json": {"eos_token_id": []}, "tokenizer_config.json": {"eos_token": "none"}}, set()),
    ],
)
def test_the_tokens_that_end_a_text(word_folder, files, eos):
    for name, content in files.items():
        (word_folder / name).write_text(json.dumps(content))
    assert JsonTokenizer(word_folder / "tokenizer.json").eos == eos


def test_bytes_that_end_a_text(tmp_path):
    assert load_tokenizer(tmp_path, 256).eos == set()
    (tmp_path / "config.json").write_text('{"eos_token_id": 10}')
    assert load_tokenizer(tmp_path, 256).eos == {10}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert load_tokenizer(tmp_path, 256).eos == {2, 3}


def test_tokenizers_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing, and the model has 300 tokens"):
        load_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text("{}")
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, 256)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json: 'utf-8' codec"):
        load_tokenizer(tmp_path, 256)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=re.escape('pip install "gqa-ext[generate]"')):
        load_tokenizer(tmp_path, 256)


# ---- the command ----


def test_the_command_writes_the_models_text_and_figures(tiny, capsys):
    assert __main__.main(["generate", "--prompt", "HOPE, n.  ", "--max-new-tokens", "30"]) == 0
    out, err = capsys.readouterr()
    text, figures = out.rstrip("\n").rsplit("\n\n", 1)
    assert text == "HOPE, n.  " + bytes(tiny.generate("HOPE, n.  ", 30)).decode()
    assert re.fullmatch(
        r"prefill  10 tokens, [\d,.]+ tokens per second\n"
        r"decode   29 tokens, [\d,.]+ tokens per second\n"
        r"KV cache 4,096 bytes per token, 163,840 bytes in all, float32",
        figures,
    )
    assert err == ""


@pytest.mark.parametrize(("size", "noted"), [(502, False), (503, True)])
def test_a_text_longer_than_the_model_knows(capsys, size, noted):
    assert __main__.main(["generate", "--prompt", "a" * size, "--max-new-tokens", "10"]) == 0
    figures = capsys.readouterr().out.rsplit("\n\n", 1)[1]
    assert ("note     the model's config promises 512 tokens" in figures) is noted


@pytest.mark.parametrize(
    ("dtype", "heads", "nbytes"), [("float16", 8, 2048), ("bfloat16", 2, 512), ("int8", 2, 320), ("int8", 8, 1280)]
)
def test_options_reach_the_model(tiny, capsys, dtype, heads, nbytes):
    words = ["--temperature", "0.7", "--seed", "5", "--kv-dtype", dtype, "--num-kv-heads", str(heads)]
    assert __main__.main(["generate", "tiny", "--prompt", "An ", "--max-new-tokens", "40", *words]) == 0
    text, figures = capsys.readouterr().out.rstrip("\n").rsplit("\n\n", 1)
    made = tiny.pooled(heads).generate("An ", 40, temperature=0.7, seed=5, kv_dtype=dtype)
    assert text == "An " + bytes(made).decode("utf-8", "replace")
    assert f"KV cache {nbytes:,} bytes per token, {43 * nbytes:,} bytes in all, {dtype}" in figures


@pytest.mark.parametrize("eos", [1, [1], [0, 1, 4]])
def test_a_text_ends_at_its_last_token(word_folder, capsys, monkeypatch, eos):
    """A model that says "cat the </s> cat": the end is not shown, and nothing comes after it."""
    (word_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = load_tokenizer(word_folder, 6)
    tiny = llama.load()
    monkeypatch.setattr(generate, "open_model", lambda path: (tiny, tokenizer))
    monkeypatch.setattr(llama.Llama, "generate", lambda *_, **__: iter([3, 2, 1, 3]))
    assert __main__.main(["generate", "--prompt", "the"]) == 0
    assert capsys.readouterr().out.startswith("the cat the\n\nprefill  2 tokens")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "'nowhere' is neither a folder"),
        (["."], "load(): config.json does not exist; config.json and model.safetensors, or its shards and "),
        (["nowhere.gguf"], "nowhere.gguf does not exist; the path of a GGUF file was wanted"),
        (["--num-kv-heads", "3"], "num_kv_heads is 3"),
        (["--max-new-tokens", "9" * 30], f"max_new_tokens is {'9' * 30} behind 1 token; KVCache(): capacity is 1"),
        (["--prompt", ""], "no tokens"),
        (["--prompt", "\ud800"], "surrogates"),
    ],
)
def test_bad_input_exits_with_1_and_one_line(words, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["generate", "--prompt", "x", *words]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("gqa-ext generate: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert "tokens per second" not in out


@pytest.mark.parametrize(
    ("name", "word", "wanted"),
    [
        *(("--max-new-tokens", word, "a whole number of at least 1") for word in ("0", "-1", "1.5", "many", "1e400")),
        *(("--num-kv-heads", word, "a whole number of at least 1") for word in ("0", "-2")),
        *(("--seed", word, "a whole number of at least 0") for word in ("-1", "x")),
        *(("--temperature", word, "a finite number of at least 0") for word in ("-1", "nan", "inf", "hot")),
    ],
)
def test_a_number_out_of_range_is_named(name, word, wanted, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["generate", "--prompt", "x", name, word])
    assert stop.value.code == 2
    assert f"error: argument {name}: {word!r} was given; {wanted} was wanted\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["tiny"],
        *(["--prompt", "x", *rest] for rest in (["--kv-dtype", "float64"], ["one", "two"], ["--nonsense"])),
    ],
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["generate", *words])
    assert stop.value.code == 2
    assert "usage: gqa-ext" in capsys.readouterr().err


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        yield ord("a")
        raise KeyboardInterrupt

    monkeypatch.setattr(llama.Llama, "generate", interrupted)
    assert __main__.main(["generate", "--prompt", "x"]) == 130
    assert capsys.readouterr().out == "xa"


def test_a_stranger_runs_it(tmp_path):
    """In a terminal that knows nothing but ASCII, far from the sources."""
    done = subprocess.run(
        [sys.executable, "-m", "gqa_ext", "generate", "--prompt", "Café", "--max-new-tokens", "5"],
        cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Caf\\xe9")
    assert "bytes in all" in done.stdout
