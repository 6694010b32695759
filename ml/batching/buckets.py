"""Buckets: which (resolution, frames, size) cells an example trains in, by the rules of Open-Sora 1.1 to 2.0.

Resolutions are tried from the largest area down, frame counts from the longest down. An example fits a resolution when
its H x W is at least 0.8 of the nominal area; it takes the longest frame count that it has (passing over one with
1 - `keep_length`); then it is kept with the bucket's probability, or else falls to the next lower resolution. Images
are single frames of clips: every clip also enters the 1-frame buckets, by the same rule. The draws depend on the seed
and on the clip's id only, so that a clip keeps its bucket whatever clips stand beside it.

Source: od/bucket.py, 1.1 to main (area 0.8, frame interval to at most `fps_max`, keep probability).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ml.sections import Bucket
from ml.shapes import MIN_AREA, Size, frame_interval, nearest_size, nominal_area

Buckets = Mapping[str, Mapping[int, Bucket]]


@dataclass(frozen=True, order=True)
class Cell:
    """One bucket: resolution name, frames T, and the size (H, W) of one aspect ratio."""

    resolution: str
    frames: int
    size: Size

    def __str__(self) -> str:
        return f"{self.resolution}/{self.size}/{self.frames}"


@dataclass(frozen=True)
class Footage:
    """What bucketing must know of a clip."""

    clip_id: str
    size: Size
    num_frames: int
    fps: float


@dataclass(frozen=True)
class Bucketing:
    """The rule: sizes are multiples of `multiple` pixels, frame rates at most `fps_max`, draws seeded."""

    multiple: int
    fps_max: float
    seed: int

    def cells(self, clip: Footage, buckets: Buckets) -> tuple[Cell, ...]:
        """Cells that hold this clip: at most one as video and one as image; none when it fits nowhere."""
        found = (self._video(clip, buckets), self._image(clip, buckets))
        return tuple(cell for cell in found if cell is not None)

    def length(self, clip: Footage) -> int:
        """Frames of the clip at the training frame rate."""
        return (clip.num_frames - 1) // frame_interval(clip.fps, self.fps_max) + 1

    def rate(self, clip: Footage) -> float:
        """Frames per second that are left of the clip's own."""
        return clip.fps / frame_interval(clip.fps, self.fps_max)

    def holds(self, clip: Footage, resolution: str, frames: int) -> bool:
        """Whether the clip has enough frames and pixels for one shape."""
        return self.length(clip) >= frames and self.fits(clip, resolution)

    def fits(self, clip: Footage, resolution: str) -> bool:
        """Whether the clip has enough pixels for a resolution."""
        return clip.size.area >= MIN_AREA * nominal_area(resolution)

    def size(self, clip: Footage, resolution: str) -> Size:
        """The size of a resolution whose aspect ratio is nearest to the clip's."""
        return nearest_size(resolution, self.multiple, clip.size)

    def _video(self, clip: Footage, buckets: Buckets) -> Cell | None:
        length = self.length(clip)
        for resolution in _from_largest(buckets):
            frames = self._frames(clip, buckets, resolution, length)
            if frames is not None and self._kept(clip, buckets, resolution, frames):
                return Cell(resolution, frames, self.size(clip, resolution))
        return None

    def _frames(self, clip: Footage, buckets: Buckets, resolution: str, length: int) -> int | None:
        """The longest frame count that the clip has and that takes it; a shorter one where `keep_length` says no."""
        for frames in sorted((t for t in buckets[resolution] if 1 < t <= length), reverse=True):
            accept = buckets[resolution][frames].keep_length
            if uniform(self.seed, clip.clip_id, resolution, frames, "length") < accept:
                return frames
        return None

    def _image(self, clip: Footage, buckets: Buckets) -> Cell | None:
        for resolution in _from_largest(buckets):
            if 1 in buckets[resolution] and self._kept(clip, buckets, resolution, 1):
                return Cell(resolution, 1, self.size(clip, resolution))
        return None

    def _kept(self, clip: Footage, buckets: Buckets, resolution: str, frames: int) -> bool:
        keep = buckets[resolution][frames].keep
        return self.fits(clip, resolution) and uniform(self.seed, clip.clip_id, resolution, frames) < keep


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only: the same draw on every machine, in every order."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def _from_largest(buckets: Buckets) -> list[str]:
    return sorted(buckets, key=nominal_area, reverse=True)
