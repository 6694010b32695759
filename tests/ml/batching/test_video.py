from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ml.batching.video import ClipCache, DecodeError, read_clip, span, write_clip
from ml.metrics import psnr
from ml.shapes import Size


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """Ten frames of 48x80; frame i is grey 20 + 20 i on the left half and black on the right."""
    frames = np.zeros((10, 48, 80, 3), np.uint8)
    for index in range(10):
        frames[index, :, :40] = 20 + 20 * index
    return write_clip(tmp_path / "ramp.mp4", frames, 12.0, crf=1)


def test_a_span_starts_at_the_beginning_or_anywhere_it_fits() -> None:
    assert span(20, 5, 2) == [0, 2, 4, 6, 8]
    starts = {span(20, 5, 2, np.random.default_rng(seed))[0] for seed in range(300)}
    assert starts == set(range(12))


def test_a_clip_too_short_for_a_span_is_named() -> None:
    with pytest.raises(DecodeError, match="need 9 frames, the clip has 8"):
        span(8, 5, 2)


def test_the_frames_asked_for_are_the_frames_given(ramp: Path) -> None:
    clip = read_clip(ramp, [1, 4, 9], Size(48, 80))
    assert clip.shape == (3, 48, 80, 3)
    assert clip.dtype == np.uint8
    assert np.abs(clip[:, 24, 20, 0].astype(int) - [40, 100, 200]).max() <= 4


def test_the_picture_is_scaled_to_cover_and_cut_to_the_centre(ramp: Path) -> None:
    """48x80 covers 32x32 at scale 2/3: width 53, of which columns 10 to 42 stay; the edge at 40 of 80 lands on 16."""
    clip = read_clip(ramp, [9], Size(32, 32))[0]
    assert clip.shape == (32, 32, 3)
    assert clip[:, :14].min() > 180
    assert clip[:, 19:].max() < 20


def test_unreadable_and_short_files_are_named(tmp_path: Path, ramp: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(DecodeError, match=r"broken.mp4 cannot be decoded"):
        read_clip(broken, [0], Size(16, 16))
    with pytest.raises(DecodeError, match="ended after 2 of the frames asked for"):
        read_clip(ramp, [0, 3, 12], Size(16, 16))


def test_what_is_written_is_read_back_and_bytes_repeat(tmp_path: Path) -> None:
    y, x = np.mgrid[0:64, 0:96]
    frames = np.stack([np.stack([x * 2, y * 3, (x + y + 8 * t) % 256], -1) for t in range(5)]).astype(np.uint8)
    first = write_clip(tmp_path / "one.mp4", frames, 12.0)
    second = write_clip(tmp_path / "two.mp4", frames, 12.0)
    assert first.read_bytes() == second.read_bytes()
    assert psnr(frames[..., :2], read_clip(first, None, Size(64, 96))[..., :2]) > 28
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "two.mp4"]


def test_the_cache_forgets_the_oldest_and_never_changes_a_frame(
    tmp_path: Path, make_video: Callable[..., Path]
) -> None:
    paths = [make_video(tmp_path / f"{i}.mp4", 6, (48, 80), seed=i) for i in range(3)]
    size, clip_bytes = Size(16, 16), 6 * 16 * 16 * 3
    cache = ClipCache(max_bytes=8 * clip_bytes)
    for path in (*paths, *paths):
        assert np.array_equal(cache.read(path, 6, [1, 3], size), read_clip(path, [1, 3], size))
    paths[0].unlink()
    assert cache.read(paths[0], 6, [0], size).shape == (1, 16, 16, 3)
    with pytest.raises(DecodeError):
        ClipCache(max_bytes=clip_bytes).read(paths[0], 6, [0], size)
    with pytest.raises(DecodeError, match="has 6 frames, number 7"):
        cache.read(paths[1], 8, [7], size)
