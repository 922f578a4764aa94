"""A Llama-shaped decoder in plain torch as a careful user would write it for speed: the model behind tools/torch_baseline.py.

Fused QKV and gate-up matrices, a static KV cache, SDPA with grouped heads, greedy sampling on the GPU. A layer is one function of tensors, so
that one compilation serves all layers; it is cut where a GEMM ends (the residual is added by the next layer), so that the compiler fuses
across layers as it would in the whole graph. Random weights: only its speed is of interest; a test checks its values against transformers.
Development only, never imported by the package. Test: pytest tests/host/test_torch_baseline.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

LayerFunction = Callable[..., tuple[Tensor, Tensor]]
HeadFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Dims:
    """The numbers of a config.json that the model needs."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dims:
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
        )


@dataclass(frozen=True)
class LayerWeights:
    """One layer's matrices, [outputs, inputs] as torch keeps them."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 num_kv_heads) head_dim, hidden]
    output: Tensor  # [hidden, num_heads head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 intermediate, hidden]
    down: Tensor  # [hidden, intermediate]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.attention_norm, self.qkv, self.output, self.mlp_norm, self.gate_up, self.down)


def random_weight(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.02)


class Weights:
    """Random weights of a shape."""

    def __init__(self, dims: Dims, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        d = dims
        qkv_rows = (d.num_heads + 2 * d.num_kv_heads) * d.head_dim

        def ones() -> Tensor:
            return torch.ones(d.hidden, device=device, dtype=dtype)

        self.embedding = random_weight((d.vocab, d.hidden), device, dtype)
        self.layers = [
            LayerWeights(
                attention_norm=ones(),
                qkv=random_weight((qkv_rows, d.hidden), device, dtype),
                output=random_weight((d.hidden, d.num_heads * d.head_dim), device, dtype),
                mlp_norm=ones(),
                gate_up=random_weight((2 * d.intermediate, d.hidden), device, dtype),
                down=random_weight((d.hidden, d.intermediate), device, dtype),
            )
            for _ in range(d.num_layers)
        ]
        self.final_norm = ones()
        self.head = random_weight((d.vocab, d.hidden), device, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotary_table(dims: Dims, num_positions: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, [num_positions, head_dim / 2] in fp32."""
    pairs = torch.arange(0, dims.head_dim, 2, device=device, dtype=torch.float32) / dims.head_dim
    angles = (
        torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * dims.rope_theta ** -pairs[None, :]
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [batch, heads, tokens, head_dim]; cos, sin broadcast against its halves."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def make_layer(dims: Dims, num_attended: int, is_prefill: bool) -> LayerFunction:
    """One layer over hidden states [batch, tokens, hidden]; writes the cache at `positions`, attends to its first num_attended."""
    d = dims
    q_features, kv_features = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim

    def layer(
        residual: Tensor,  # [batch, tokens, hidden]
        delta: Tensor,  # [batch, tokens, hidden], what the layer before left to be added
        attention_norm: Tensor,
        qkv_weight: Tensor,
        output_weight: Tensor,
        mlp_norm: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        k_cache: Tensor,  # [batch, num_kv_heads, positions, head_dim]
        v_cache: Tensor,
        positions: Tensor,  # [tokens], of all requests
        cos: Tensor,  # [tokens, head_dim / 2]
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = residual + delta
        batch, tokens, _ = x.shape
        qkv = F.linear(rms_norm(x, attention_norm, d.norm_eps), qkv_weight)
        q, k, v = torch.split(qkv, [q_features, kv_features, kv_features], dim=-1)
        q = rotate(q.view(batch, tokens, d.num_heads, d.head_dim).transpose(1, 2), cos, sin)
        k = rotate(k.view(batch, tokens, d.num_kv_heads, d.head_dim).transpose(1, 2), cos, sin)
        v = v.view(batch, tokens, d.num_kv_heads, d.head_dim).transpose(1, 2)
        k_cache.index_copy_(2, positions, k)
        v_cache.index_copy_(2, positions, v)
        attended = F.scaled_dot_product_attention(
            q,
            k_cache[:, :, :num_attended],
            v_cache[:, :, :num_attended],
            is_causal=is_prefill,
            enable_gqa=d.num_heads != d.num_kv_heads,
        )
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, tokens, q_features), output_weight)
        gate, up = F.linear(rms_norm(x, mlp_norm, d.norm_eps), gate_up_weight).chunk(2, dim=-1)
        return x, F.linear(F.silu(gate) * up, down_weight)

    return layer


def make_head(dims: Dims) -> HeadFunction:
    """Greedy next ids [batch] from the last token's hidden state."""

    def head(residual: Tensor, delta: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        x = residual[:, -1] + delta[:, -1]
        return F.linear(rms_norm(x, norm, dims.norm_eps), weight).argmax(-1)

    return head


class Step:
    """One step at fixed sizes over static tensors: ids in, next ids out. Its KV cache is its own."""

    def __init__(
        self,
        dims: Dims,
        weights: Weights,
        *,
        batch: int,
        num_tokens: int,
        num_attended: int,
        compiler: Callable[[Any], Any],
    ) -> None:
        """num_tokens new tokens of each request, the last of num_attended positions; num_tokens > 1 is a prefill from position 0."""
        is_prefill = num_tokens > 1
        if is_prefill and num_tokens != num_attended:
            raise ValueError(
                f"a prefill of {num_tokens} tokens that attends to {num_attended} positions; expected as many; it begins at position 0"
            )
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._dims, self._weights, self._num_attended = dims, weights, num_attended
        self._layer = compiler(make_layer(dims, num_attended, is_prefill))
        self._head = compiler(make_head(dims))
        self.ids = torch.randint(dims.vocab, (batch, num_tokens), device=device)
        shape = (batch, dims.num_kv_heads, num_attended, dims.head_dim)
        self._caches = [
            (random_weight(shape, str(device), dtype), random_weight(shape, str(device), dtype)) for _ in weights.layers
        ]
        self._positions = torch.arange(num_attended - num_tokens, num_attended, device=device)
        cos, sin = rotary_table(dims, num_attended, str(device))
        self._cos, self._sin = cos[self._positions], sin[self._positions]
        self.next_ids = torch.zeros(batch, dtype=torch.int64, device=device)

    def run(self) -> None:
        """The step, feeding a decode's next ids back to the next step."""
        residual = F.embedding(self.ids, self._weights.embedding)
        delta = torch.zeros_like(residual)
        for weights, (k_cache, v_cache) in zip(self._weights.layers, self._caches, strict=True):
            residual, delta = self._layer(
                residual, delta, *weights.tensors(), k_cache, v_cache, self._positions, self._cos, self._sin
            )
        self.next_ids.copy_(self._head(residual, delta, self._weights.final_norm, self._weights.head))
        if self.ids.shape[1] == 1:
            self.ids.copy_(self.next_ids[:, None])
