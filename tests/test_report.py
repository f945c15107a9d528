"""ConversionReport: HTML, pictures and bits per token."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gqa_ext import llama
from gqa_ext.convert import ConversionReport, convert_checkpoint
from gqa_ext.convert.plots import head_similarity
from gqa_ext.convert.safetensors import SafetensorsFile

TEXT = (llama.TINY / "heldout.txt").read_bytes()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    tokens = np.frombuffer(TEXT[:256], np.uint8).reshape(2, 128)
    return convert_checkpoint(
        llama.TINY, tmp_path_factory.mktemp("report") / "dst", 2, progress=False, evaluate=tokens
    )


def test_bits_per_token(report: ConversionReport) -> None:
    torch = pytest.importorskip("torch")
    tokens = np.frombuffer(TEXT[:256], np.uint8).reshape(2, 128).astype(np.int64)
    before, after = report.bits_per_token_before, report.bits_per_token_after
    for folder, got in ((report.source, before), (report.destination, after)):
        logits = torch.from_numpy(llama.load(folder).forward(tokens)[:, :-1].reshape(-1, 256))
        want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[:, 1:].reshape(-1))) / math.log(2)
        assert got == pytest.approx(float(want), rel=1e-5)
    assert before < after
    assert ConversionReport.from_dict(json.loads(report.to_json())) == report


def test_evaluate_refuses_before_it_writes(tmp_path) -> None:
    for wrong in ([[1]], [0.5, 1.0], [1, 999], 3):
        with pytest.raises(ValueError, match=r"evaluate|tokens"):
            convert_checkpoint(llama.TINY, tmp_path / "dst", 2, progress=False, evaluate=wrong)
    assert not list(tmp_path.iterdir())


def test_html_is_escaped(report: ConversionReport) -> None:
    evil = "<script>alert('&')</script>"
    changed = dataclasses.replace(report, source=evil, destination=evil, architecture=evil, files={evil: evil})
    page = changed._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") == 5
    for row in report.layers:
        assert f"{row.key_error:.4f}" in page


def test_similarity_is_the_cosine_of_heads(report: ConversionReport) -> None:
    weight = SafetensorsFile(llama.TINY / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    heads = np.asarray(weight, np.float64).reshape(8, -1)
    want = np.corrcoef(heads)  # of the same heads without their mean: near, not equal
    got = head_similarity(report, 1, "value")
    np.testing.assert_allclose(np.diag(got), 1, rtol=1e-12)
    np.testing.assert_allclose(got, want, atol=0.02)
    assert got[0, 5] == pytest.approx(heads[0] @ heads[5] / math.sqrt((heads[0] @ heads[0]) * (heads[5] @ heads[5])))


def test_plots(report: ConversionReport, tmp_path) -> None:
    bars = report.plot().axes[0].patches
    heights = [bar.get_height() for bar in bars]
    assert heights == [row.key_error for row in report.layers] + [row.value_error for row in report.layers]
    figure = report.plot(layer=2)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(images[0], head_similarity(report, 2, "key"))
    figure.savefig(tmp_path / "similarity.png")
    with pytest.raises(ValueError, match="layer"):
        report.plot(layer=9)
