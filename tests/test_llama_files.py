"""Folders of models as others write them: names, pickles, tied heads, and a config that is not believed."""

import numpy as np
import pytest
from test_llama import GROUPED, random_weights, write_model

from gqa_ext import __main__, llama
from gqa_ext.convert import inspect_checkpoint


def test_harmless_extra_tensors(tmp_path):
    weights = random_weights(GROUPED)
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    spare["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_model(tmp_path, GROUPED | {"tie_word_embeddings": True}, weights | spare)
    model = llama.load(tmp_path)
    assert model.lm_head is model.embed_tokens


def test_weights_under_other_names(tmp_path):
    """One file of any name, as converted ones have, and tensors without `model.`, as LlamaModel saves them."""
    config = GROUPED | {"tie_word_embeddings": True, "hidden_act": "swish"}  # transformers' other name of silu
    weights = random_weights(GROUPED)
    del weights["lm_head.weight"]
    wanted = llama.load(write_model(tmp_path / "a", config, weights)).forward([[1, 2, 3]])
    bare = {name.removeprefix("model."): array for name, array in weights.items()}
    folder = write_model(tmp_path / "b", config, bare)
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    assert (llama.load(folder).forward([[1, 2, 3]]) == wanted).all()
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        llama.load(write_model(tmp_path / "c", GROUPED, bare))


def test_a_folder_of_pickles_says_how_to_save_it_again(tmp_path, capsys):
    folder = write_model(tmp_path / "a", GROUPED, {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    (folder / "optimizer.pt").write_bytes(b"nor this")
    with pytest.raises(ValueError, match=r"^load\(\): .*pytorch_model.bin is a pickle, .* save it again: python -c"):
        llama.load(folder)
    for path, words in (folder / "pytorch_model.bin", "is a pickle"), (folder / "config.json", "pass its folder"):
        assert __main__.main(["generate", str(path), "--prompt", "x"]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", [10**9, 10**30])
def test_a_number_of_layers_is_not_believed(tmp_path, number):
    with pytest.raises(ValueError, match=rf"num_hidden_layers is {number}; up to 10000 are read"):
        llama.load(write_model(tmp_path, GROUPED | {"num_hidden_layers": number}, random_weights(GROUPED)))
    assert "the tensors lack layers [2, 3, 4" in repr(inspect_checkpoint(tmp_path))


def test_a_head_of_its_own_is_not_tied(tmp_path):
    """Whatever config.json says, as in transformers 5."""
    weights = random_weights(GROUPED)
    write_model(tmp_path, GROUPED | {"tie_word_embeddings": True}, weights)
    model = llama.load(tmp_path)
    assert (model.lm_head == weights["lm_head.weight"]).all()
    assert not model.config.tie_word_embeddings
