"""Resolutions, aspect ratios and frame counts: the arithmetic that recipe, planner and buckets share.

Letters: H W pixels, T frames, t h w latent grid. Sizes are (height, width) in pixels.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ml.aspects import ASPECT_RATIOS, NOMINAL_AREAS, RATIOS, table

# How an autoencoder shortens time: each frame alone (Stable Diffusion); first frame, then fours (HunyuanVideo); 17
# frames at a time, the rest padded (OpenSora-VAE 1.2); windows of 17 that share a frame (1.3); fours only (DC-AE).
Law = Literal["frame", "causal", "micro", "window", "group"]
STRIDE, MICRO_FRAMES, MICRO_LATENTS = 4, 17, 5
# Share of a resolution's nominal area that a clip needs to train there (od/bucket.py, 1.1 to main).
MIN_AREA = 0.8


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
    """How many pixels and frames one token stands for: the law and stride of the autoencoder, the patch.

    A network that `pads` takes any latent grid and fills up its last row and column of tokens; another needs grids that
    its patch divides.
    """

    law: Law
    spatial: int
    patch: int
    pads: bool = False

    @property
    def pixels(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.spatial * (1 if self.pads else self.patch)

    @property
    def temporal(self) -> int:
        """Frames of one latent."""
        return 1 if self.law == "frame" else STRIDE

    def latent_frames(self, frames: int) -> int:
        """Latent frames t of T frames.

        frame: T. causal: (T-1)/4 + 1. micro: 5 floor(T/17) + ceil((T mod 17)/4). window: 5 floor((T-1)/16), a single
        window shorter than 17 frames as causal. group: T/4, a picture 1. (om/vae, 1.2 and 1.3; om/dc_ae, main.)
        """
        if self.law == "frame":
            return frames
        if self.law == "micro":
            return MICRO_LATENTS * (frames // MICRO_FRAMES) + math.ceil(frames % MICRO_FRAMES / STRIDE)
        if self.law == "window" and frames >= MICRO_FRAMES:
            return MICRO_LATENTS * ((frames - 1) // (MICRO_FRAMES - 1))
        return max(1, frames // STRIDE) if self.law == "group" else (frames - 1) // STRIDE + 1

    def encodes(self, frames: int) -> bool:
        """Whether the autoencoder can encode exactly this many frames."""
        if frames < 1:
            return False
        if self.law == "group":
            return frames == 1 or frames % STRIDE == 0
        if self.law == "window" and frames > MICRO_FRAMES:
            return (frames - 1) % (MICRO_FRAMES - 1) == 0
        return self.law in ("frame", "micro") or (frames - 1) % STRIDE == 0

    def nearest(self, frames: int) -> tuple[int, int]:
        """The frame counts around this one that can be encoded."""
        low = next(n for n in range(max(1, frames), 0, -1) if self.encodes(n))
        return low, next(n for n in range(max(low + 1, frames), 2 * frames + MICRO_FRAMES) if self.encodes(n))

    def grid(self, size: Size, frames: int) -> tuple[int, int, int]:
        """Latent grid (t, h, w) of a clip."""
        return self.latent_frames(frames), size.height // self.spatial, size.width // self.spatial

    def tokens(self, size: Size, frames: int) -> int:
        """Visual tokens L of one clip."""
        latents, height, width = self.grid(size, frames)
        return latents * math.ceil(height / self.patch) * math.ceil(width / self.patch)


def frame_interval(fps: float, fps_max: float) -> int:
    """Every how many frames one is taken, so that the rate is at most `fps_max` (Open-Sora 2.0 trains at 24 or less).

    A rate within 1 % of the limit counts as the limit: 24.02 frames per second is not halved.
    """
    return max(1, math.ceil(fps / fps_max - 0.01))


def nominal_area(resolution: str) -> int:
    """Pixels per frame that a resolution name stands for: `256px` is 256 squared, `48x80` is itself, `360p` as listed.

    Raises ValueError for anything else.
    """
    if resolution in NOMINAL_AREAS:
        return NOMINAL_AREAS[resolution]
    if match := re.fullmatch(r"(\d+)px", resolution):
        return int(match[1]) ** 2
    if match := re.fullmatch(r"(\d+)x(\d+)", resolution):
        return int(match[1]) * int(match[2])
    raise ValueError(
        f"resolution {resolution!r} is neither '<N>px' (N squared pixels, every aspect) nor '<H>x<W>' nor one of "
        f"{', '.join(NOMINAL_AREAS)}"
    )


@cache
def sizes_of(resolution: str, multiple: int) -> dict[str, Size]:
    """Sizes of every aspect ratio of a resolution, rounded down to `multiple` pixels.

    `<N>px` follows Open-Sora 2.0 at inference: W = floor(sqrt(area * ratio) / m) * m, H = floor(area / W / m) * m. Its
    training rounds W likewise and then takes, of the sizes within 16 pixels of it, the one nearest in area; here both
    use the formula of inference, so that what is sampled is what was trained. Listed resolutions are the tables of 1.1
    to 1.3. An explicit `HxW` has one size, as written. Of names whose sizes coincide after rounding, the first is
    listed (`size_of` knows them all). Raises ValueError when the resolution is smaller than one token.
    """
    area = nominal_area(resolution)
    if resolution in NOMINAL_AREAS:
        listed = {name: _floor(Size(*size), multiple) for name, size in table(resolution).items()}
        return _distinct(listed, resolution, multiple)
    if not resolution.endswith("px"):
        height, width = (int(part) for part in resolution.split("x"))
        return {f"{width}:{height}": Size(height, width)}
    sizes: dict[str, Size] = {}
    for name, ratio in ASPECT_RATIOS.items():
        width = int(math.sqrt(area * ratio) / multiple) * multiple
        sizes[name] = Size(int(area / width / multiple) * multiple if width else 0, width)
    return _distinct(sizes, resolution, multiple)


def size_of(resolution: str, multiple: int, aspect: str) -> Size:
    """The size of a resolution for an aspect, by any generation's name (W:H).

    A name of the resolution's own table is that table's size, any other known one the nearest in ratio: small
    resolutions have few sizes, and an explicit `HxW` has one. Raises ValueError for an unknown name.
    """
    sizes = sizes_of(resolution, multiple)
    if aspect in sizes:
        return sizes[aspect]
    if resolution in NOMINAL_AREAS and aspect in table(resolution):
        return _floor(Size(*table(resolution)[aspect]), multiple)
    if aspect not in RATIOS:
        raise ValueError(f"aspect {aspect!r} is unknown; known: {', '.join(dict.fromkeys((*sizes, *RATIOS)))}")
    return nearest_size(resolution, multiple, Size(height=1000, width=round(1000 * RATIOS[aspect])))


def nearest_size(resolution: str, multiple: int, size: Size) -> Size:
    """The size of a resolution whose aspect ratio is nearest to the one given (in log ratio)."""
    wanted = math.log(size.width / size.height)
    return min(sizes_of(resolution, multiple).values(), key=lambda s: abs(math.log(s.width / s.height) - wanted))


def _floor(size: Size, multiple: int) -> Size:
    return Size(size.height // multiple * multiple, size.width // multiple * multiple)


def _distinct(sizes: dict[str, Size], resolution: str, multiple: int) -> dict[str, Size]:
    """The first name of every size of at least one token."""
    found: dict[str, Size] = {}
    for name, size in sizes.items():
        if size.height and size.width and size not in found.values():
            found[name] = size
    if not found:
        raise ValueError(f"resolution {resolution!r} is smaller than one token of {multiple} pixels")
    return found
