"""The models of the benchmarks, in plain PyTorch: causal language models, GPT-2-like or Llama-like, and an MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal self-attention; with `rotary` positions enter by rotation of queries and keys."""

    def __init__(self, width: int, heads: int, *, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.rotary:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x, shape (N, heads, T, d), by angles whose cos and sin are (T, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GPTLayer(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP of four times the width with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=True, rotary=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LlamaLayer(nn.Module):
    """RMSNorm, rotary attention, RMSNorm, SwiGLU of 2.75 times the width; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = width * 11 // 4
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, bias=False, rotary=True)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        x_norm = self.norm2(x)
        return x + self.down(F.silu(self.gate(x_norm)) * self.up(x_norm))


class LanguageModel(nn.Module):
    """Embedding, layers, norm, head. GPT-2-like: learned positions, head tied to the embedding; Llama-like: neither.

    `loss(tokens)` is the mean cross-entropy of the next token; tokens have shape (N, T) with T ≤ length.
    """

    def __init__(
        self, *, layers: int, width: int, heads: int, vocabulary: int, length: int, llama: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = None if llama else nn.Embedding(length, width)
        make_layer = LlamaLayer if llama else GPTLayer
        self.layers = nn.ModuleList(make_layer(width, heads) for _ in range(layers))
        self.norm: nn.Module = nn.RMSNorm(width, eps=1e-5) if llama else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().to(self.head.weight.dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(self.head.weight.dtype), persistent=False)
        for table in (self.embedding, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        if not llama:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            x = layer(x, (self.cos[:length], self.sin[:length]))
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Hidden(nn.Module):
    """Twelve hidden layers of width 512, trained to fit noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(512, 512), nn.ReLU())))

    def loss(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.layers(batch), batch.flip(0))


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    tokens: int  # per batch; 0: no language model


def language_model(
    layers: int, width: int, heads: int, vocabulary: int, length: int, samples: int, llama: bool
) -> Size:
    """Return a model with a batch of `samples` × `length` tokens (and the token that follows)."""
    return Size(
        lambda: LanguageModel(
            layers=layers, width=width, heads=heads, vocabulary=vocabulary, length=length, llama=llama
        ),
        lambda: torch.randint(vocabulary, (samples, length + 1)),
        samples * length,
    )


def llama_of(layers: int) -> Size:
    """A wide Llama-like model, 0.2 billion parameters per layer, whose depth grows until memory is full."""
    return language_model(layers, 4096, 32, 32_000, 512, 1, llama=True)


SIZES = {
    "gpt": language_model(12, 256, 4, 5000, 128, 8, llama=False),
    "mlp": Size(Hidden, lambda: torch.randn(512, 512), 0),
    "1b": language_model(18, 2048, 16, 32_000, 1024, 4, llama=True),
    "largest": llama_of(4),  # grows
}


class Repeat:
    """The same batch again and again: loading costs nothing."""

    def __init__(self, batch: Tensor, times: int) -> None:
        self.item, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.item] * self.times)
