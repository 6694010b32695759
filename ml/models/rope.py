"""Rotary positions: attention that depends on how far apart two tokens are.

Letters: B batch, N heads, L tokens, D head size, A axes of position. Two layouts are in use, with the same angles: the
released 2.0 weights turn lane j with lane j + D/2 (`rotate`, half-split, Liger's), Flux and the networks before 2.0
turn lane 2j with lane 2j + 1 (`rotate_pairs`, interleaved).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_angles(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Rotation angles of every position: [...,A] -> [...,D/2], the axes' angles laid side by side.

    Axis a has axes[a] lanes (D = sum of them) and the frequencies theta^(-2i/axes[a]); float64, as Flux computes them
    (the half-split variant of Open-Sora 2.0 takes float32, om/mmdit/math.py, main; they differ by rounding only).
    """
    parts = []
    for axis, size in enumerate(axes):
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        parts.append(positions[..., axis, None].double() * theta**-exponents)
    return torch.cat(parts, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate lane j with lane j + D/2 (the half-split layout of the released 2.0 weights).

    x [B,N,L,D] with cos, sin [L,D/2] or [B,1,L,D/2]; computed in at least float32, returned in the dtype of x.
    """
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate lane 2j with lane 2j + 1 (the interleaved layout of Flux); shapes as `rotate`."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def positions(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """(t, h, w) of every token of a grid: [t h w, 3] of whole numbers, t slowest.

    They are int64, so that mixed precision, which rounds floating-point inputs, cannot move a token.
    """
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)
