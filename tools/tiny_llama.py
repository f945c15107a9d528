"""The network that train_tiny.py trains: Llama's, under Hugging Face's tensor names (needs torch).

Pre-norm blocks of rotary multi-head attention and SwiGLU, RMSNorm, one embedding matrix for both ends (Touvron et al.
2023; rotate-half RoPE as transformers lays it out). It is only trained here; gqa_ext.llama runs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the model, under the names Hugging Face's ``LlamaConfig`` gives them."""

    hidden_size: int = 128
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    head_dim: int = 16
    max_position_embeddings: int = 512
    vocab_size: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def as_llama(self) -> dict[str, object]:
        """Return the contents of config.json that make transformers' ``LlamaForCausalLM`` load the weights."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "torch_dtype": "bfloat16",
        }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x, (B, H, N, D), by the angles of its positions; cos and sin are (N, D), both halves alike."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Attention(nn.Module):
    """Causal multi-head attention; every head has its own key and value."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x, (B, N, E), to the same shape; attention itself in float32, where torch's CPU kernel is fastest."""
        query, key, value = (
            proj(x).float().unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        with torch.autocast("cpu", enabled=False):
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (B, N, E), to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x, (B, N, E), to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and last norm: what Hugging Face calls ``model``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A byte-level Llama; its ``state_dict`` has the names of ``LlamaForCausalLM`` with tied embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else config.hidden_size**-0.5 / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, N, 256) for tokens (B, N)."""
        positions = torch.arange(tokens.shape[1], dtype=torch.float32)
        powers = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        angles = torch.outer(positions, self.config.rope_theta**-powers).repeat(1, 2)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
