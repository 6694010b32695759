import wave
from pathlib import Path

import numpy as np
import pytest

from ml.curation import footage


def test_times_count_from_the_first_frame(tmp_path, encode, scene):
    path = encode(tmp_path / "a.mp4", scene(1, 30), fps=24)
    with footage.Reader(path) as reader:
        seconds = [s for s, _ in reader.frames()]
    assert seconds == pytest.approx([i / 24 for i in range(30)], abs=1e-6)


def test_reading_from_the_middle_gives_the_frames_that_reading_all_gives(tmp_path, encode, scene):
    path = encode(tmp_path / "a.mp4", scene(1, 60), fps=24, gop=12)
    with footage.Reader(path) as reader:
        everything = {round(s * 24): footage.rgb(f) for s, f in reader.frames()}
    with footage.Reader(path) as reader:
        late = {round(s * 24): footage.rgb(f) for s, f in reader.frames(1.7)}
    assert min(late) == 36  # the keyframe at or before 1.7 s
    assert max(late) == 59
    assert all(np.array_equal(late[i], everything[i]) for i in late)


def test_glimpses_are_a_twelfth_of_a_second_apart_at_every_frame_rate(tmp_path, encode, scene):
    for fps, gap in ((12, 1), (24, 2), (60, 5)):
        path = encode(tmp_path / f"{fps}.mp4", scene(2, 40), fps=fps)
        seen = footage.Footage.read(path, 40, fps)
        assert seen.interval_seconds == pytest.approx(gap / fps)
        assert seen.first.shape == seen.second.shape == (8, 120, 160, 3)


def test_one_frame_is_a_clip_that_does_not_move(tmp_path, encode, scene):
    path = encode(tmp_path / "one.mp4", scene(3, 1))
    seen = footage.Footage.read(path, 1, 24)
    assert len(seen.first) == 1
    assert np.array_equal(seen.first, seen.second)


def test_a_clip_shorter_than_its_row_says_is_an_error(tmp_path, encode, scene):
    path = encode(tmp_path / "short.mp4", scene(3, 10))
    with pytest.raises(footage.FootageError, match=r"short\.mp4 ends before frame"):
        footage.Footage.read(path, 20, 24)


def test_what_is_no_video_says_why(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all " * 50)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    cases = {
        "absent.mp4": "no such file",
        "empty.mp4": "0 bytes",
        "text.mp4": "not a readable",
        "sound.wav": "only audio",
    }
    for name, words in cases.items():
        with pytest.raises(footage.FootageError, match=words):
            footage.Reader(tmp_path / name)


def test_the_middle_frame_is_from_the_middle(tmp_path, encode):
    frames = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(21)]
    path = encode(tmp_path / "ramp.mp4", frames, fps=21)
    assert footage.middle_frame(path, 1.0).mean() == pytest.approx(110, abs=12)


def test_gray_shrinks_and_never_enlarges():
    frame = np.zeros((120, 160, 3), np.uint8)
    assert footage.gray(frame, 60).shape == (60, 80)
    assert footage.gray(frame, 240).shape == (120, 160)
