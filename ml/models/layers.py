"""Parts that transformers share: embeddings of time, modulation, norms.

Letters: B batch, L tokens, N heads, D head size, W width of the network.
"""

import math

import torch
from torch import Tensor, nn

# Flux and Open-Sora 2.0 use this epsilon in every norm (om/mmdit/layers.py, main).
NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale; computed in at least float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """Norms of queries and keys, one scale per lane, shared by all heads."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_size)
        self.key_norm = RMSNorm(head_size)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """[B,N,L,D] twice -> the same shapes."""
        return self.query_norm(query), self.key_norm(key)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: lifts a vector (time, pooled text, guidance) to the width of the network."""

    def __init__(self, in_size: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_size, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,in] -> [B,W]."""
        embedded: Tensor = self.out_layer(nn.functional.silu(self.in_layer(x)))
        return embedded


class Modulation(nn.Module):
    """Linear(SiLU(vec)) cut into `count` vectors: shift, scale, gate, and again for a second sub-layer.

    Starts at zero, so a fresh block is the identity.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B,W] -> `count` tensors [B,1,W]."""
        chunks: tuple[Tensor, ...] = self.lin(nn.functional.silu(vec))[:, None].chunk(self.count, dim=-1)
        return chunks


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without learned parameters."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise, then scale and shift: [B,L,W] with [B,1,W] twice."""
    return layer_norm(x) * (1 + scale) + shift


def timestep_embedding(t: Tensor, size: int, max_period: float = 10000.0, factor: float = 1000.0) -> Tensor:
    """Sinusoids of a time in 0..1: [B] -> [B,size], cosines first (as Flux; time is multiplied by 1000)."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = factor * t.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
