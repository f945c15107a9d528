"""One row for each architecture: what its attention's tensors are called and how heads lie in them.

Names are those of transformers 5 (models/*/modeling_*.py) and of the files on the Hub. Data only; layouts.py
reads it. A row that is not here is given by hand as ``layout=``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .._messages import fail, kind, short

__all__ = ["ARCHITECTURES", "LONE", "Layout", "as_layout"]


@dataclass(frozen=True)
class Layout:
    """How one layer's attention is named and laid out; also what ``layout=`` takes, as this or as a dict.

    Attributes
    ----------
    layer : str
        What stands before the names of a layer, with ``{layer}`` for its number. More may stand before it ("model."),
        the same for all layers. Without ``{layer}`` each place where the names are found is a layer.
    q, k, v, o : str
        The projections: ``q + ".weight"`` (out, in), ``".bias"`` if there is one. `o` projects back.
    qkv : str, optional
        One projection in the place of `q`, `k` and `v`.
    fused : {'stacked', 'interleaved'}
        Rows of `qkv`: all heads of q, then of k, then of v; or q, k and v of the first head, then of the second.
    transposed : bool
        Weights are (in, out), as GPT-2's Conv1D has them.
    q_norm, k_norm : str, optional
        Norms of queries and keys. Their weights are (head_dim,) for all heads, (heads, head_dim), (heads * head_dim,)
        or, with ``{head}`` in the name, a tensor for each head.
    kv_key : str, optional
        The config's entry for the number of key/value heads. None: it has none, so the format cannot express GQA.
    fixed_heads : bool
        What a head does depends on its number, as ALiBi's slopes do, so query heads cannot be permuted.
    head_dim : int, optional
        What an absent ``head_dim`` in the config means; None means hidden_size // num_attention_heads.
    """

    layer: str = "layers.{layer}.self_attn."
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    fused: str = "stacked"
    transposed: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    kv_key: str | None = "num_key_value_heads"
    fixed_heads: bool = False
    head_dim: int | None = None

    @property
    def anchor(self) -> str:
        """The projection by which a layer is found."""
        return self.qkv or self.q


_LLAMA = Layout()
_PER_LAYER_NORMS = Layout(q_norm="q_norm", k_norm="k_norm")

# The config's model_type: its row.
ARCHITECTURES: Mapping[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Layout(q_norm="q_norm", k_norm="k_norm", head_dim=128),
    "gemma": Layout(head_dim=256),
    "gemma2": Layout(head_dim=256),
    "phi": Layout(o="dense", q_norm="q_layernorm", k_norm="k_layernorm"),
    "stablelm": Layout(q_norm="q_layernorm.norms.{head}", k_norm="k_layernorm.norms.{head}"),
    "olmo": _LLAMA,
    "olmo2": _PER_LAYER_NORMS,
    "cohere": _PER_LAYER_NORMS,
    "phi3": Layout(qkv="qkv_proj"),
    "gpt_neox": Layout(
        layer="layers.{layer}.attention.", qkv="query_key_value", fused="interleaved", o="dense", kv_key=None
    ),
    "gpt2": Layout(layer="h.{layer}.attn.", qkv="c_attn", o="c_proj", transposed=True, kv_key=None),
    "opt": Layout(o="out_proj", kv_key=None),
    "bloom": Layout(
        layer="h.{layer}.self_attention.",
        qkv="query_key_value",
        fused="interleaved",
        o="dense",
        kv_key=None,
        fixed_heads=True,
    ),
}

# State dicts without a config, in the order in which they are tried.
LONE: Mapping[str, Layout] = {
    "q_proj, k_proj, v_proj, out_proj": Layout(layer="", o="out_proj", q_norm="q_norm", k_norm="k_norm"),
    "q_proj, k_proj, v_proj, o_proj": Layout(layer="", q_norm="q_norm", k_norm="k_norm"),
    "torch.nn.MultiheadAttention": Layout(layer="", qkv="in_proj", o="out_proj"),
    "q, k, v, o": Layout(layer="", q="q", k="k", v="v", o="o"),
}

_EXAMPLE = (
    'layout={"layer": "model.layers.{layer}.self_attn.", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"} '
    'or, fused, {"layer": ..., "qkv": "qkv_proj", "fused": "stacked", "o": "o_proj"}'
)


def as_layout(call: str, layout: Any) -> Layout:
    """A layout given by hand."""
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, Mapping):
        fail(TypeError, call, f"layout is {kind(layout)}", "a dict or a Layout was wanted", f"pass {_EXAMPLE}")
    known = {field.name: field.default for field in fields(Layout)}
    strange = [name for name in layout if name not in known]
    if strange:
        wanted = f"{', '.join(known)} were wanted"
        fail(ValueError, call, f"layout has {', '.join(map(repr, strange))}", wanted, f"pass {_EXAMPLE}")
    for name, entry in layout.items():
        fits = entry is None and known[name] is None
        if not (fits or isinstance(entry, (type(known[name]), int if name == "head_dim" else str))):
            fail(TypeError, call, f"layout[{name!r}] is {kind(entry)}", "another kind was wanted", f"pass {_EXAMPLE}")
    made = Layout(**layout)
    if made.fused not in ("stacked", "interleaved"):
        wanted = "'stacked' or 'interleaved' was wanted"
        fail(ValueError, call, f"layout['fused'] is {short(made.fused)}", wanted, "pass 'stacked' for q, k, v in turn")
    return made


def unknown(call: str, model_type: Any, nested: str | None) -> NoReturn:
    """Refuse a config whose architecture is not in the table."""
    came = f"config.json has model_type {model_type!r:.60}"
    if nested:
        came += f" and keeps its language model's numbers in {nested}, which is not read"
    wanted = f"one of {', '.join(ARCHITECTURES)} was wanted"
    fail(ValueError, call, came, wanted, f"name the tensors by hand: {_EXAMPLE}")
