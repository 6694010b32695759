"""Windowed 3-D attention and 3-D rotary positions of Open-Sora 1.3 (om/layers/blocks.py, 1.3).

Letters: B batch, H W T the grid of tokens (in this order, T fastest, as the release lays windows out), h w t the
window, M windows of one sample, N = h w t tokens of a window, S = H W or this rank's share of them, D width of the
network, n heads, K head size.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ml.models.attention import attention
from ml.models.rope import rotate_pairs
from ml.models.sequence import HERE, Shared
from ml.models.stdit_layers import Grid, Projections, Rope, RotaryTime

WHOLE = -1
AXES = 3


class WindowError(ValueError):
    """A window or a head size that this attention cannot work with."""


@dataclass(frozen=True)
class Windows:
    """How a grid (H, W, T) is cut into windows (h, w, t); the last window of an axis may stick out over its end."""

    grid: Grid
    size: Grid

    @classmethod
    def cut(cls, grid: Grid, kernel_size: Grid) -> "Windows":
        """Windows of `kernel_size` (H, W, T), where -1 is the whole axis of the grid."""
        height, width, frames = (s if k == WHOLE else k for s, k in zip(grid, kernel_size, strict=True))
        return cls(grid, (height, width, frames))

    @property
    def counts(self) -> Grid:
        """Windows along H, W and T."""
        height, width, frames = (-(-s // k) for s, k in zip(self.grid, self.size, strict=True))
        return height, width, frames

    def split(self, x: Tensor) -> Tensor:
        """[B,H,W,T,D] -> [B M,N,D]; the grid is padded with zeros at the end of its axes to whole windows."""
        return self._partition(self._pad(x))

    def join(self, windows: Tensor) -> Tensor:
        """[B M,N,D] -> [B,H,W,T,D], without the padding: the inverse of `split`."""
        height, width, frames = self.grid
        x = rearrange(windows, "(b nh nw nt) (h w t) d -> b (nh h) (nw w) (nt t) d", **self._sizes())
        return x[:, :height, :width, :frames]

    def mask(self, like: Tensor) -> Tensor | None:
        """What is added to the products of a window's keys, [M,1,1,N]: 0, and -inf for padding; None without padding.

        On the device and in the dtype of `like`.
        """
        if all(s % k == 0 for s, k in zip(self.grid, self.size, strict=True)):
            return None
        real = self._partition(self._pad(like.new_ones(1, *self.grid, 1)))[:, None, None, :, 0]
        return torch.zeros_like(real).masked_fill(real == 0, float("-inf"))

    def _pad(self, x: Tensor) -> Tensor:
        ends = [n * k - s for s, k, n in zip(self.grid, self.size, self.counts, strict=True)]
        return torch.nn.functional.pad(x, (0, 0, 0, ends[2], 0, ends[1], 0, ends[0])) if any(ends) else x

    def _partition(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (nh h) (nw w) (nt t) d -> (b nh nw nt) (h w t) d", **self._sizes())

    def _sizes(self) -> dict[str, int]:
        return dict(zip(("h", "w", "t", "nh", "nw", "nt"), (*self.size, *self.counts), strict=True))


class WindowAttention(Projections):
    """Self-attention within windows of `kernel_size` (H, W, T; -1 = the whole axis), under the names of `Attention`.

    A window lies across the shares of several ranks, so every rank attends in all windows with some of the heads.
    Windows are never shifted: the original has a switch for it that no released network sets. Raises WindowError for a
    window that is neither -1 nor positive.
    """

    def __init__(self, width: int, heads: int, kernel_size: Grid, qk_norm: bool = False) -> None:
        super().__init__(width, heads, qk_norm)
        if any(k != WHOLE and k < 1 for k in kernel_size):
            raise WindowError(
                f"kernel_size {kernel_size}: give tokens (H, W, T), each positive or -1 for the whole axis"
            )
        self.kernel_size = kernel_size

    def forward(
        self, x: Tensor, grid: Grid, rope: Rope | None = None, mask: Tensor | None = None, shared: Shared = HERE
    ) -> Tensor:
        """[B,T,S,D] -> the same shape; grid (T, H, W) over all ranks, `rope` [N,K/2] twice (`grid_rope` of the window).

        `mask` [M,1,1,N] is that of `Windows.mask`, which is made here when it is not given.
        """
        frames, height, width = grid
        windows = Windows.cut((height, width, frames), self.kernel_size)
        mask = windows.mask(x) if mask is None else mask
        packed = rearrange(self.qkv(x), "b t s (three n k) -> (three b t) n s k", three=3, n=self.heads)
        volume = rearrange(shared.to_heads(packed), "(b t) n (h w) k -> b h w t (n k)", t=frames, h=height)
        heard = self._within(windows.split(volume), packed.shape[-1], rope, mask)
        parts = rearrange(windows.join(heard), "b h w t (n k) -> (b t) n (h w) k", k=packed.shape[-1])
        joined: Tensor = self.proj(rearrange(shared.to_tokens(parts), "(b t) n s k -> b t s (n k)", t=frames))
        return joined

    def _within(self, packed: Tensor, head_size: int, rope: Rope | None, mask: Tensor | None) -> Tensor:
        """Queries, keys and values of windows one after the other, [3 B M,N,n K] -> what is heard, [B M,N,n K]."""
        query, key, value = rearrange(packed, "(three m) l (n k) -> three m n l k", three=3, k=head_size)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rotate_pairs(query, *rope), rotate_pairs(key, *rope)
        if mask is not None:
            mask = mask.repeat(len(query) // len(mask), 1, 1, 1)
        # Autocast leaves the norm's output wider than the value.
        heard = attention(query.to(value.dtype), key.to(value.dtype), value, mask)
        return rearrange(heard, "m n l k -> m l (n k)")


def grid_rope(rope: RotaryTime, grid: Grid, scale: float) -> Rope:
    """Cosines and sines [H W T,K/2] of the tokens of a grid or a window (H, W, T), in the order of its tokens.

    A third of the lanes each turns with T, H and W, in this order. Rows and columns stand at index / scale, frames at
    their index; `scale` is the square root of the clip's pixels over the network's `input_sq_size`. `rope` holds the
    frequencies of a third of a head (`rope_size`).
    """
    height, width, frames = (torch.arange(size, device=rope.freqs.device) for size in grid)
    axes = (rope(frames), rope(height / scale), rope(width / scale))
    cos, sin = (_spread(grid, along_t, along_h, along_w) for along_t, along_h, along_w in zip(*axes, strict=True))
    return cos, sin


def rope_size(head_size: int) -> int:
    """Lanes that one of the three axes turns: a third of the head.

    Raises WindowError when a head has no three equal parts of whole pairs (the released heads have 72 lanes).
    """
    if head_size % (2 * AXES):
        raise WindowError(
            f"3-D positions cut a head in three parts of pairs: head size {head_size} is no multiple of 6"
        )
    return head_size // AXES


def _spread(grid: Grid, along_t: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Values of every position of the three axes, [T,k], [H,k] and [W,k], side by side for every token: [H W T,3 k]."""
    parts = (along_t[None, None], along_h[:, None, None], along_w[None, :, None])
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)
