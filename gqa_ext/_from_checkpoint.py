"""One layer of a checkpoint as a module: its weights by the converter's table of layouts, its rules by the config.

_config_options.py says what a config means beside names and shapes. What the module cannot compute is refused by
name. Base class of module.py's.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from ._arguments import as_int
from ._config_options import RMS_NORMS, attention_options
from ._messages import Array, fail
from .convert.header import DTYPES
from .convert.heads import Part, arrange, spelt
from .convert.layouts import Model, find_layers, read_model
from .convert.source import Source, open_source

CALL = "GroupedQueryAttention.from_checkpoint"
# Buffers of older files: causal masks, and frequencies that follow from the config.
BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")

T = TypeVar("T")


class FromCheckpoint(Generic[T]):
    """Gives a class `from_checkpoint`, which makes a T."""

    _grouped: ClassVar[Callable[..., Any]]

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        layer: int,
        *,
        num_heads: int | None = None,
        layout: Any = None,
        **options: Any,
    ) -> T:
        """The attention of one layer of a model on disk, of any architecture that the converter knows.

        Parameters
        ----------
        path : str or path-like
            As the `src` of :func:`gqa_ext.convert.convert_checkpoint`: a Hugging Face folder, a .safetensors file with
            config.json beside it, or one (or an .npz) without, a lone state dict.
        layer : int
            From 0.
        num_heads : int, optional
            Query heads, for a lone state dict, which does not say.
        layout : dict, optional
            Names the tensors of an unknown architecture.
        **options
            Keywords of the constructor, which go before what the config says. A lone state dict and `layout` say
            nothing but weights: `rope`, `window`, `qk_norm` and the like are then what is passed.

        Returns
        -------
        GroupedQueryAttention
            float64 where a tensor is, else float32; half precision is widened. Causality is for the caller to ask:
            ``is_causal=True``.

        Raises
        ------
        ValueError
            A source that the converter refuses, or no such layer.
        NotImplementedError
            The layer has what the module lacks: norms over all heads (OLMo 2), LayerNorms of heads (Cohere, Phi,
            StableLM), clipped projections (OLMo), key/value biases that are tokens (torch's ``bias_k``).
        FileNotFoundError
            A file is missing.

        Examples
        --------
        >>> from pathlib import Path
        >>> import gqa_ext
        >>> tiny = Path(gqa_ext.__file__).parent / "tiny"
        >>> gqa_ext.GroupedQueryAttention.from_checkpoint(tiny, 0)
        GroupedQueryAttention(128, 8, 8, rope=RotaryEmbedding(16, base=10000.0))
        """
        number = as_int(CALL, "layer", layer, 0)
        source = open_source(path, CALL, "path")
        model = read_model(CALL, source.config, source.tensors, layout, num_heads)
        if number >= len(model.layers):
            came = f"layer is {number} for {os.fspath(path)}"
            fail(ValueError, CALL, came, f"0 to {len(model.layers) - 1} were wanted", "name a layer that is there")
        weights = _Weights(source, model, number)
        state = weights.read()
        settings = {**attention_options(CALL, model, source.config, number), **weights.shapes(state), **options}
        _check_norms(state, settings)
        made: T = cls._grouped(state["q_proj.weight"].shape[1], *weights.heads, **settings)
        made.load_state_dict(state)  # type: ignore[attr-defined]
        return made


class _Weights:
    """What one layer has on disk, under the module's names."""

    def __init__(self, source: Source, model: Model, number: int) -> None:
        self.source, self.row, self.layer = source, model.layout, model.layers[number]
        self.prefix = find_layers(CALL, model.layout, source.tensors)[self.layer.index]
        self.own_norms = model.architecture in RMS_NORMS
        self.heads = self.layer.num_heads, self.layer.num_kv_heads

    def read(self) -> dict[str, Array]:
        """All parameters; biases that only some of q, k and v have are zeros in the others."""
        self._refuse_rest()
        arrays = {name: array for part in self._parts() for name, array in self._cut(part)}
        arrays |= {ours: self._array(name) for ours, name in self._whole().items()}
        if any(f"{role}_proj.bias" in arrays for role in "qkv"):
            for role in "qkv":
                weight = arrays[f"{role}_proj.weight"]
                arrays.setdefault(f"{role}_proj.bias", np.zeros(len(weight), weight.dtype))
        return arrays

    def shapes(self, state: dict[str, Array]) -> dict[str, Any]:
        """Keywords of the constructor that follow from the arrays."""
        return {
            "head_dim": self.layer.head_dim,
            "v_head_dim": self.layer.v_head_dim,
            "kv_embed_dim": state["k_proj.weight"].shape[1],
            "bias": "q_proj.bias" in state,
            "out_bias": "o_proj.bias" in state,
            "sinks": state.get("sinks"),
            "dtype": "float64" if any(array.dtype == np.float64 for array in state.values()) else "float32",
        }

    def _parts(self) -> Iterator[Part]:
        """The projections; norms of heads are _whole's or refused."""
        norms = tuple(f"{self.prefix}{norm}." for norm in (self.row.q_norm, self.row.k_norm) if norm)
        return (part for part in self.layer.parts if not part.name.startswith(norms))

    def _whole(self) -> dict[str, str]:
        """Our name: theirs, for what is taken as it is."""
        named = {"o_proj.bias": spelt(f"{self.prefix}{self.row.o}", "bias")}
        if self.own_norms:
            named |= {"q_norm.weight": (f"{self.prefix}{self.row.q_norm}.weight",)}
            named |= {"k_norm.weight": (f"{self.prefix}{self.row.k_norm}.weight",)}
            named |= {"sinks": (f"{self.prefix}sinks",)}
        return {ours: name for ours, names in named.items() for name in names if name in self.source.tensors}

    def _refuse_rest(self) -> None:
        """A tensor that would be left out could change the result."""
        taken = {*(part.name for part in self._parts()), *self._whole().values()}
        taken |= {self.prefix + buffer for buffer in BUFFERS}
        rest = [name for name in self.source.tensors if name.startswith(self.prefix) and name not in taken]
        if rest:
            wanted = "projections, their biases and RMSNorms of head_dim were wanted, as the module has no more"
            came = f"{self.source.path}: tensor {rest[0]} is part of the layer"
            fail(NotImplementedError, CALL, came, wanted, "compute this layer with the library that it comes from")

    def _cut(self, part: Part) -> Iterator[tuple[str, Array]]:
        """The rows of q, k and v, or the columns of o; (out, in), as torch.nn.Linear has them."""
        array = self._array(part.name)
        kind = "weight" if array.ndim == 2 else "bias"
        if array.ndim == 2 and self.row.transposed:
            array = array.T
        if part.arrangement == "o":
            yield "o_proj.weight", array
            return
        slots = arrange(part.arrangement, *self.heads)
        blocks = array.reshape(len(slots), part.slot, *array.shape[1:])
        for role in dict.fromkeys(role for role, _ in slots):
            mine = blocks[[place for place, (owner, _) in enumerate(slots) if owner == role]]
            yield f"{role}_proj.{kind}", mine.reshape(-1, *array.shape[1:])

    def _array(self, name: str) -> Array:
        """One tensor, widened to float32 where it is narrower."""
        shard = self.source.shards[self.source.shard_of(name)]
        info = shard.header.tensors[name]
        dtype = DTYPES[info.dtype][1]
        assert dtype is not None  # read_model takes four dtypes
        with open(shard.path, "rb") as file:
            file.seek(shard.data_start + info.start)
            array = np.frombuffer(file.read(info.nbytes), dtype).reshape(info.shape)
        return array.astype(np.promote_types(np.float32, dtype) if dtype.kind == "f" else np.float32)


def _check_norms(state: dict[str, Array], settings: dict[str, Any]) -> None:
    """Norms need the eps, which only a config says."""
    if "q_norm.weight" in state and settings.get("qk_norm") is None:
        wanted = "the eps of q_norm and k_norm was wanted, which no tensor says"
        fail(ValueError, CALL, "qk_norm is None", wanted, "pass qk_norm=1e-6, or what the model was trained with")
