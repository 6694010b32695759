"""Small real videos, encoded here: textured pictures that move as told."""

from collections.abc import Callable, Iterable
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
import pytest

Frames = Iterable[npt.NDArray[np.uint8]]
Encode = Callable[..., Path]


@pytest.fixture(scope="session")
def texture() -> Callable[[int], npt.NDArray[np.uint8]]:
    """A large smooth random picture, uint8 RGB [480, 640, 3], another for each seed."""

    def make(seed: int) -> npt.NDArray[np.uint8]:
        noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        return np.asarray(cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)

    return make


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Encode RGB frames as H.264 with a keyframe every `gop` frames; returns the path."""

    def write(path: Path, frames: Frames, fps: int = 24, gop: int = 12, **options: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = None
            for frame in frames:
                if stream is None:
                    stream = container.add_stream("libx264", rate=fps)
                    stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                    stream.codec_context.gop_size = gop
                    stream.options = {"crf": "16", "preset": "ultrafast", "threads": "1", **options}
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            assert stream is not None
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def scene(texture: Callable[[int], npt.NDArray[np.uint8]]) -> Callable[..., list[npt.NDArray[np.uint8]]]:
    """Frames of a window that slides over a texture: `count` frames of 160x120, `dx` pixels further each frame."""

    def make(seed: int, count: int, dx: float = 1.0) -> list[npt.NDArray[np.uint8]]:
        picture = texture(seed)
        lefts = [round(dx * i) for i in range(count)]
        return [np.ascontiguousarray(picture[100:220, left : left + 160]) for left in lefts]

    return make
