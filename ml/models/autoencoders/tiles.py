"""Blended tiling of a network in time and space, so that its memory depends on the tile and not on the video.

Every tile after the first shares `overlap` cells with the one before it, in which a linear ramp leads from the old to
the new. The tile above is blended in first, then the one at the left, both as already blended themselves, as Open-Sora
2.0 does (om/hunyuan_vae and om/dc_ae, main): where four tiles meet, their weights differ a little from a product of
ramps, and still sum to one everywhere. A short last tile (a video whose size no tile divides) blends what it shares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Sizes = tuple[int, int, int]
# Size of a tile along one axis, and what it shares with the one before.
Cut = tuple[int, int]
Ratio = tuple[int | Fraction, int | Fraction, int | Fraction]
AXES = ("frames", "height", "width")
# The tile of an axis that is never cut.
WHOLE = 1 << 40


@dataclass(frozen=True)
class Tiling:
    """How to cut (t, h, w): `tile` and `overlap` in input cells, `ratio` output cells per input cell.

    `causal` is for networks that keep the first frame apart (T = 4k+1): tiles in time then have one frame more, and
    the first output frame of every tile but the first is dropped. `margin`, in output cells, is what each side of an
    inner seam is thrown away before the ramp: a network whose output sees no further than `margin` is then exact.
    Raises ValueError when tiles or overlaps are no whole number of output cells, or leave no step or no ramp.
    """

    tile: Sizes
    overlap: Sizes
    ratio: Ratio = (1, 1, 1)
    causal: bool = False
    margin: Sizes = (0, 0, 0)

    def __post_init__(self) -> None:
        for axis, name in enumerate(AXES):
            tile, overlap, ratio = self.tile[axis], self.overlap[axis], self.ratio[axis]
            if not 0 <= overlap < tile:
                raise ValueError(f"{name}: an overlap of {overlap} leaves tiles of {tile} no step; make it smaller")
            if Fraction(tile * ratio).denominator > 1 or Fraction(overlap * ratio).denominator > 1:
                raise ValueError(
                    f"{name}: tiles of {tile} and overlaps of {overlap} times {ratio} are no whole cells; "
                    f"make both multiples of {Fraction(ratio).denominator}"
                )
            if overlap * ratio < 2 * self.margin[axis]:
                raise ValueError(f"{name}: an overlap of {overlap} cannot hold two margins of {self.margin[axis]}")

    @classmethod
    def of(cls, cuts: tuple["Cut | None", "Cut | None", "Cut | None"], ratio: Ratio, causal: bool = False) -> "Tiling":
        """Tiles of these cuts of (t, h, w); an axis of None is never cut."""
        tile, overlap = zip(*(each or (WHOLE, 0) for each in cuts), strict=True)
        return cls(tile, overlap, ratio, causal)

    def inverse(self) -> "Tiling":
        """The same tiles for the network that goes back, counted in its input cells."""
        tile, overlap = (
            tuple(int(size * by) for size, by in zip(sizes, self.ratio, strict=True))
            for sizes in (self.tile, self.overlap)
        )
        ratio = tuple(1 / Fraction(by) for by in self.ratio)
        return Tiling(tile, overlap, ratio, self.causal)  # type: ignore[arg-type]  # three of each

    def fits(self, x: Tensor, *axes: int) -> bool:
        """Whether one tile holds the whole of x [B,C,T,H,W] along these axes (0 time, 1 height, 2 width)."""
        return all(x.shape[axis + 2] <= self.tile[axis] for axis in axes)

    def starts(self, axis: int, size: int) -> range:
        """Where the tiles of an axis of `size` input cells begin."""
        return range(0, size, self.tile[axis] - self.overlap[axis])

    def kept(self, axis: int) -> int:
        """Output cells that a tile gives before the next one begins."""
        return int((self.tile[axis] - self.overlap[axis]) * self.ratio[axis])


def cut(size: int, overlap_factor: float) -> Cut:
    """Tiles of `size` that share so much of it, as the original rounds: the step between two is rounded down."""
    return size, size - int(size * (1 - overlap_factor))


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    """What `network` gives for x [B,C,T,H,W], computed tile by tile; [B,C',T',H',W'] by `tiling.ratio`.

    Equal to `network(x)` when one tile holds x. An axis of the plane that would fit is cut too as soon as the other
    does not, like in the original.
    """
    if tiling.fits(x, 0):
        return _plane(network, x, tiling)
    first = 1 if tiling.causal else 0
    frames, parts = x.shape[2], list[Tensor]()
    before: Tensor | None = None
    for start in tiling.starts(0, frames - first):
        part = _plane(network, x[:, :, start : start + tiling.tile[0] + first], tiling)
        if before is not None:
            part = _blend(before, part[:, :, first:], tiling, 0)
        parts.append(part[:, :, : tiling.kept(0) + (first if before is None else 0)])
        before = part
    return torch.cat(parts, dim=2)


def _plane(network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    """The tiles of height and width; only two rows of them are held at a time."""
    if tiling.fits(x, 1, 2):
        return network(x)
    above, rows = list[Tensor](), list[Tensor]()
    for top in tiling.starts(1, x.shape[3]):
        row = list[Tensor]()
        for tile in _row(network, x[:, :, :, top : top + tiling.tile[1]], tiling):
            if above:
                tile = _blend(above[len(row)], tile, tiling, 1)
            if row:
                tile = _blend(row[-1], tile, tiling, 2)
            row.append(tile)
        rows.append(torch.cat([tile[..., : tiling.kept(1), : tiling.kept(2)] for tile in row], dim=4))
        above = row
    return torch.cat(rows, dim=3)


def _row(network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Iterator[Tensor]:
    for left in tiling.starts(2, x.shape[4]):
        yield network(x[..., left : left + tiling.tile[2]])


def _blend(before: Tensor, tile: Tensor, tiling: Tiling, axis: int) -> Tensor:
    """`tile` with its first cells along `axis` led over from the last ones of the tile before it."""
    dim, margin = axis + 2, tiling.margin[axis]
    shared = min(before.shape[dim], tile.shape[dim], int(tiling.overlap[axis] * tiling.ratio[axis]))
    if shared == 0:
        return tile
    wide = torch.promote_types(tile.dtype, torch.float32)  # half precision cannot count the cells of a wide ramp
    steps = torch.arange(shared, dtype=wide, device=tile.device) - margin
    # A last tile with no room for a ramp ends where its neighbour ends: the neighbour is right to the end.
    ramp = (steps / (shared - 2 * margin)).clamp(0, 1) if shared > 2 * margin else torch.zeros_like(steps)
    shape = [1] * tile.ndim
    shape[dim] = shared
    ramp = ramp.view(shape)
    old = before.narrow(dim, before.shape[dim] - shared, shared)
    new, rest = tile.narrow(dim, 0, shared), tile.narrow(dim, shared, tile.shape[dim] - shared)
    return torch.cat([(old * (1 - ramp) + new * ramp).to(tile.dtype), rest], dim=dim)
