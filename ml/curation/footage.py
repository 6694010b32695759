"""Reading footage: one decoder for shot detection, cutting, scoring and pictures.

Letters: N glimpses, H W pixels, 3 channels of RGB. Times are seconds from the first frame of the video stream, taken
from the container's own timestamps, so a variable frame rate keeps its clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.stream import Disposition

Pixels = npt.NDArray[np.uint8]

GLIMPSES = 8
GLIMPSE_INTERVAL_SECONDS = 1 / 12


class FootageError(ValueError):
    """A file that cannot be read as video, saying why."""


class Reader:
    """Decodes the video stream of one file, in order.

    `broken` collects the seconds at which a packet could not be decoded or a frame came out damaged: decoding goes on
    after them, and whoever cuts decides what to do. `fast` leaves out the in-loop deblocking filter, which makes H.264
    cheaper to decode and pictures slightly blocky: right for detection, wrong for anything that is kept.
    """

    def __init__(self, path: Path, threads: int = 1, fast: bool = False) -> None:
        """Open the file; raises FootageError for what is no video."""
        self.path = path
        self.broken: list[float] = []
        self._container = open_container(path)
        self.stream = video_stream(self._container, path)
        context = self.stream.codec_context
        context.thread_count = threads
        context.thread_type = "AUTO" if threads > 1 else "NONE"
        if fast:
            context.options = {"skip_loop_filter": "all"}

    def __enter__(self) -> Self:
        """The reader itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self._container.close()

    @property
    def fps(self) -> float:
        """Frames per second that the container states, or 0 when it states none."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    def seconds(self, pts: int | None, count: int) -> float:
        """Time of a packet or frame; one without a timestamp (raw MPEG, old AVI) is timed by counting."""
        if pts is None:
            return count / self.fps if self.fps else 0.0
        return float((pts - (self.stream.start_time or 0)) * self.stream.time_base)

    def frames(self, start_seconds: float = 0.0) -> Iterator[tuple[float, Any]]:
        """Yield (seconds, av.VideoFrame) from the last keyframe at or before `start_seconds` to the end.

        A container without timestamps, or whose index points past the wanted time, is read from the beginning instead.
        """
        if start_seconds > 0:
            self._seek(start_seconds)
            seconds, frame = next(self._decoded(), (0.0, None))
            timed = frame is not None and frame.pts is not None and seconds <= start_seconds
            self._seek(start_seconds if timed else 0.0)
        yield from self._decoded()

    def _seek(self, seconds: float) -> None:
        offset = int(seconds / self.stream.time_base) + (self.stream.start_time or 0)
        self._container.seek(offset, stream=self.stream, backward=True)

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        count = 0
        for packet in self.packets():
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.broken.append(self.seconds(packet.pts, count))
                continue
            for frame in frames:
                seconds = self.seconds(frame.pts, count)
                if frame.is_corrupt:
                    self.broken.append(seconds)
                count += 1
                yield seconds, frame

    def packets(self) -> Iterator[Any]:
        """Packets of the video stream to its end, or to where the container breaks off."""
        packets = self._container.demux(self.stream)
        while True:
            try:
                yield next(packets)
            except StopIteration:
                return
            except av.FFmpegError:  # the container itself ends early; what was read so far stands
                return


@dataclass(frozen=True)
class Footage:
    """What scorers see of one clip: N glimpses spread evenly over it, each a pair of frames a short time apart.

    `first` and `second` are uint8 RGB [N, H, W, 3]; `interval_seconds` is the time from one to the other, about 1/12 s
    whatever the clip's frame rate, so that motion means the same at 12 and at 60 frames per second.
    """

    first: Pixels
    second: Pixels
    interval_seconds: float

    @property
    def middle(self) -> Pixels:
        """The glimpse nearest to the middle of the clip, uint8 RGB [H, W, 3]."""
        middle: Pixels = self.first[len(self.first) // 2]
        return middle

    @classmethod
    def read(cls, path: Path, num_frames: int, fps: float, glimpses: int = GLIMPSES) -> Self:
        """Decode a clip once and keep the glimpses; raises FootageError when it holds fewer frames than stated."""
        gap = max(1, round(fps * GLIMPSE_INTERVAL_SECONDS)) if num_frames > 1 else 0
        gap = min(gap, num_frames - 1)
        anchors = sorted({round(float(i)) for i in np.linspace(0, num_frames - 1 - gap, glimpses)})
        wanted = {i for anchor in anchors for i in (anchor, anchor + gap)}
        kept: dict[int, Pixels] = {}
        with Reader(path) as reader:
            for index, (_, frame) in enumerate(reader.frames()):
                if index in wanted:
                    kept[index] = rgb(frame)
                if len(kept) == len(wanted):
                    break
        if len(kept) < len(wanted):
            raise FootageError(f"{path.name} ends before frame {max(wanted - set(kept))} of {num_frames}")
        first, second = (np.stack([kept[a + shift] for a in anchors]) for shift in (0, gap))
        return cls(first, second, max(gap, 1) / fps)


def open_container(path: Path) -> Any:
    """The opened container; raises FootageError for what is missing, empty or no media file."""
    if not path.is_file():
        raise FootageError(f"no such file: {path.name}")
    if path.stat().st_size == 0:
        raise FootageError("the file is empty (0 bytes)")
    try:
        return av.open(str(path))
    except av.FFmpegError as error:
        raise FootageError(f"not a readable video file ({_plain(error)})") from error


def video_stream(container: Any, path: Path) -> Any:
    """The first real video stream; raises FootageError for a file with sound (and perhaps cover art) only."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = " and ".join(sorted({str(stream.type) for stream in container.streams}))
        container.close()
        raise FootageError(f"the file holds no video stream, only {kinds or 'nothing that can be read'}")
    return streams[0]


def middle_frame(path: Path, duration_seconds: float) -> Pixels:
    """One frame from the middle of a video, uint8 RGB [H, W, 3]; raises FootageError when none can be decoded."""
    with Reader(path) as reader:
        last: Any = None
        for seconds, frame in reader.frames(duration_seconds / 2):
            last = frame
            if seconds >= duration_seconds / 2 - 1e-3:
                break
        if last is None:
            raise FootageError(f"no frame of {path.name} can be decoded")
        return rgb(last)


def rgb(frame: Any) -> Pixels:
    """A decoded frame as uint8 RGB [H, W, 3], turned upright when the file says that the camera was held sideways."""
    image: Pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, k=turns(frame))) if turns(frame) else image


def turns(frame: Any) -> int:
    """Quarter turns counter-clockwise that set a decoded frame upright: 0 to 3, from the display matrix."""
    return int(round(frame.rotation / 90) % 4)


def gray(frame: Pixels, short_side: int | None = None) -> Pixels:
    """Luma of an RGB frame, uint8 [H, W], shrunk (never enlarged) to a shorter side of `short_side` pixels."""
    luma: Pixels = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    scale = short_side / min(luma.shape) if short_side else 1.0
    if scale >= 1:
        return luma
    size = (max(1, round(luma.shape[1] * scale)), max(1, round(luma.shape[0] * scale)))
    return np.asarray(cv2.resize(luma, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _plain(error: av.FFmpegError) -> str:
    return (error.strerror or str(error)).lower()
