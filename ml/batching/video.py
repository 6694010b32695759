"""Clip files in and out: frames of a bucket's shape from an mp4, and an mp4 from frames.

Letters: T frames, H W pixels. Frames are uint8 RGB, `[T, H, W, 3]`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ml.shapes import Size

Frames = NDArray[np.uint8]


class DecodeError(ValueError):
    """A clip file that cannot give the frames asked for."""


def span(num_frames: int, wanted: int, interval: int = 1, rng: np.random.Generator | None = None) -> list[int]:
    """Indices of `wanted` frames, `interval` apart: from the clip's start, or from a random place when `rng` is given.

    Raises DecodeError when the clip is too short.
    """
    length = (wanted - 1) * interval + 1
    if length > num_frames:
        raise DecodeError(f"{wanted} frames at interval {interval} need {length} frames, the clip has {num_frames}")
    start = int(rng.integers(num_frames - length + 1)) if rng is not None else 0
    return list(range(start, start + length, interval))


def read_clip(path: Path, indices: Sequence[int] | None, size: Size) -> Frames:
    """The frames with these indices (ascending), or all of them, resized to cover `size` and cropped to its centre.

    Returns uint8 `[T, H, W, 3]`. Decoding stops after the last frame wanted. Raises DecodeError for a file that cannot
    be read or that ends too early.
    """
    wanted = None if indices is None else set(indices)
    last = None if wanted is None else max(wanted)
    frames: list[Frames] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # One thread: a clip is short, and several readers share the cores with the training step.
            stream.thread_count = 1
            for index, frame in enumerate(container.decode(stream)):
                if wanted is None or index in wanted:
                    frames.append(_fit(frame, size))
                if index == last:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise DecodeError(f"{path} cannot be decoded: {error}") from error
    if not frames or (wanted is not None and len(frames) < len(wanted)):
        asked = "any frame" if wanted is None else f"{len(wanted)} frames up to number {last}"
        raise DecodeError(f"{path} ended after {len(frames)} of the frames asked for ({asked})")
    return np.stack(frames)


def write_clip(path: Path, frames: Frames, fps: float, crf: int = 18) -> Path:
    """Write uint8 `[T, H, W, 3]` as an H.264 mp4 (yuv420p) and return the path; same frames, same bytes.

    H and W must be even. `crf` is x264's quality, 18 is visually lossless (x264 documentation).
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)
    return path


class ClipCache:
    """Decoded clips by (path, size), the least recently used thrown out beyond `max_bytes`.

    A clip too large to share the cache with seven others is not kept: only the frames asked for are decoded.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._clips: OrderedDict[tuple[Path, Size], Frames] = OrderedDict()

    def __reduce__(self) -> tuple[type["ClipCache"], tuple[int]]:
        """Sent to another process, it starts empty there."""
        return ClipCache, (self._max_bytes,)

    def read(self, path: Path, num_frames: int, indices: Sequence[int], size: Size) -> Frames:
        """The frames with these indices as uint8 `[T, H, W, 3]`; raises DecodeError as `read_clip` does."""
        key = (path, size)
        if key not in self._clips:
            if num_frames * size.area * 3 > self._max_bytes // 8:
                return read_clip(path, indices, size)
            self._keep(key, read_clip(path, None, size))
        self._clips.move_to_end(key)
        clip = self._clips[key]
        if max(indices) >= len(clip):
            raise DecodeError(f"{path} has {len(clip)} frames, number {max(indices)} was asked for")
        return clip[list(indices)]

    def _keep(self, key: tuple[Path, Size], clip: Frames) -> None:
        self._clips[key] = clip
        self._bytes += clip.nbytes
        while self._bytes > self._max_bytes and len(self._clips) > 1:
            _, dropped = self._clips.popitem(last=False)
            self._bytes -= dropped.nbytes


def _fit(frame: av.VideoFrame, size: Size) -> Frames:
    """One frame scaled so that it covers `size` without changing its aspect, cropped to the centre."""
    scale = max(size.height / frame.height, size.width / frame.width)
    height, width = max(size.height, round(frame.height * scale)), max(size.width, round(frame.width * scale))
    # Area averaging when shrinking: anything sharper aliases at the strong reductions of the small buckets.
    how = "AREA" if scale < 1 else "BICUBIC"
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation=how).to_ndarray()
    top, left = (height - size.height) // 2, (width - size.width) // 2
    return np.ascontiguousarray(image[top : top + size.height, left : left + size.width])
