"""The model: Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings) in plain torch.

Who calls it: training.py, evaluation.py, export.py. Test: pytest tests/null/test_train_embedded.py

The module tree bears the names of a Hugging Face LlamaForCausalLM, so the state dict is the checkpoint. Dropout is
this file's only addition; it has no weights and is off outside training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ModelConfig:
    vocab: int = 4096
    hidden: int = 256
    num_layers: int = 9
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 128):
            raise ValueError(f"head_dim is {self.head_dim}, expected 64 or 128, which the kernels take")
        for name in ("vocab", "hidden", "intermediate"):
            if getattr(self, name) % 64:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a multiple of 64 (a GEMM slice)")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide among {self.num_kv_heads} KV heads")


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, [max_positions, head_dim], both halves alike as the rotate-half form wants them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), config.rope_theta**-exponent)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]; cos, sin: [tokens, head_dim] f32."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        heads = (batch, num_tokens, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        group = self.config.num_heads // self.config.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, -1))
        return attended


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden, config.norm_eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + functional.dropout(attended, self.dropout, self.training)
        return x + functional.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden, config.norm_eps)


class LlamaModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The projections back into the residual stream start smaller, so that depth does not blow it up.
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers) if into_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, num_tokens] -> logits [batch, num_tokens, vocab]."""
        num_tokens = tokens.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]  # type: ignore[index]
        x = functional.dropout(self.model.embed_tokens(tokens), self.config.dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
