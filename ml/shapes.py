"""Resolutions, aspect ratios and frame counts: the arithmetic that recipe, planner and buckets share.

Letters: H W pixels, T frames, t h w latent grid. Sizes are (height, width) in pixels.
"""

import math
import re
from dataclasses import dataclass
from functools import cache

# Open-Sora 2.0 names its aspect ratios W:H; the inverse of each is a bucket too (od/aspect.py, main).
ASPECT_RATIOS: dict[str, float] = {
    "2.39:1": 2.39,
    "2:1": 2.0,
    "16:9": 16 / 9,
    "1.85:1": 1.85,
    "3:2": 1.5,
    "8:5": 1.6,
    "4:3": 4 / 3,
    "1:1": 1.0,
    "3:4": 3 / 4,
    "5:8": 5 / 8,
    "2:3": 2 / 3,
    "9:16": 9 / 16,
    "1:1.85": 1 / 1.85,
    "1:2": 0.5,
    "1:2.39": 1 / 2.39,
}


@dataclass(frozen=True, order=True)
class Size:
    """A picture size in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels in one frame."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Strides:
    """How many pixels and frames one token stands for: (temporal, spatial) of autoencoder times patch."""

    temporal: int
    spatial: int
    patch: int

    @property
    def pixels(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.spatial * self.patch

    def latent_frames(self, frames: int) -> int:
        """Latent frames t of T frames under a causal autoencoder: (T - 1) / stride + 1."""
        return (frames - 1) // self.temporal + 1

    def encodes(self, frames: int) -> bool:
        """Whether a causal autoencoder can encode exactly this many frames."""
        return frames >= 1 and (frames - 1) % self.temporal == 0

    def tokens(self, size: Size, frames: int) -> int:
        """Visual tokens L of one clip."""
        return self.latent_frames(frames) * (size.height // self.pixels) * (size.width // self.pixels)


def nominal_area(resolution: str) -> int:
    """Pixels per frame that a resolution name stands for: `256px` is 256 squared, `48x80` is itself.

    Raises ValueError for anything else.
    """
    if match := re.fullmatch(r"(\d+)px", resolution):
        return int(match[1]) ** 2
    if match := re.fullmatch(r"(\d+)x(\d+)", resolution):
        return int(match[1]) * int(match[2])
    raise ValueError(f"resolution {resolution!r} is neither '<N>px' (N squared pixels, every aspect) nor '<H>x<W>'")


@cache
def sizes_of(resolution: str, multiple: int) -> dict[str, Size]:
    """Sizes of every aspect ratio of a resolution, rounded down to `multiple` pixels.

    Follows Open-Sora 2.0: W = floor(sqrt(area * ratio) / m) * m, H = floor(area / W / m) * m. An explicit `HxW` has one
    size, as written. Raises ValueError when the resolution is smaller than one token.
    """
    area = nominal_area(resolution)
    if not resolution.endswith("px"):
        height, width = (int(part) for part in resolution.split("x"))
        return {f"{width}:{height}": Size(height, width)}
    sizes: dict[str, Size] = {}
    for name, ratio in ASPECT_RATIOS.items():
        width = int(math.sqrt(area * ratio) / multiple) * multiple
        height = int(area / width / multiple) * multiple if width else 0
        if height and width and Size(height, width) not in sizes.values():
            sizes[name] = Size(height, width)
    if not sizes:
        raise ValueError(f"resolution {resolution!r} is smaller than one token of {multiple} pixels")
    return sizes


def nearest_size(resolution: str, multiple: int, size: Size) -> Size:
    """The size of a resolution whose aspect ratio is nearest to the one given (in log ratio)."""
    wanted = math.log(size.width / size.height)
    return min(sizes_of(resolution, multiple).values(), key=lambda s: abs(math.log(s.width / s.height) - wanted))
