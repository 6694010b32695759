import numpy as np
import pytest
from scenedetect import AdaptiveDetector, detect

from ml.curation import shots
from ml.sections import Shots

ADAPTIVE = Shots(detector="adaptive", threshold=3.0, min_seconds=0.5)
CONTENT = Shots(detector="content", threshold=27.0, min_seconds=0.5)
VIDEO = {"video_id": "v", "corpus": "own", "shard": "one", "num_frames": 90, "duration_seconds": 90 / 24}


@pytest.fixture(scope="module")
def three_scenes(tmp_path_factory, encode, scene):
    """Cuts at frames 30 and 55."""
    return encode(tmp_path_factory.mktemp("cuts") / "a.mp4", scene(1, 30) + scene(2, 25) + scene(3, 35), gop=250)


@pytest.mark.parametrize("settings", [ADAPTIVE, CONTENT])
def test_cuts_are_found_to_the_frame(three_scenes, settings):
    times, cuts = shots.detect(three_scenes, settings)
    assert cuts == [30, 55]
    assert len(times) == 90


def test_the_cuts_are_those_of_pyscenedetect_at_full_size(three_scenes):
    theirs = detect(str(three_scenes), AdaptiveDetector(adaptive_threshold=3.0, min_scene_len=12))
    assert shots.detect(three_scenes, ADAPTIVE)[1] == [start.frame_num for start, _ in theirs[1:]]


def test_shots_cover_the_video_without_gap_or_overlap(three_scenes):
    table = shots.shots_of(three_scenes, VIDEO, ADAPTIVE)
    assert table.start_frame.tolist() == [0, 30, 55]
    assert table.end_frame.tolist() == [30, 55, 90]
    assert table.start_seconds.tolist() == pytest.approx([0, 30 / 24, 55 / 24], abs=1e-5)
    assert table.end_seconds.tolist()[:-1] == table.start_seconds.tolist()[1:]
    assert table.end_seconds.iloc[-1] == pytest.approx(90 / 24)


def test_a_video_without_a_cut_is_one_shot(tmp_path, encode, scene):
    path = encode(tmp_path / "one.mp4", scene(4, 40))
    table = shots.shots_of(path, VIDEO | {"num_frames": 40, "duration_seconds": 40 / 24}, ADAPTIVE)
    assert table[["start_frame", "end_frame"]].to_numpy().tolist() == [[0, 40]]


def test_cuts_closer_than_the_minimum_are_not_split(tmp_path, encode, scene):
    path = encode(tmp_path / "fast.mp4", scene(1, 30) + scene(2, 5) + scene(3, 30), gop=250)
    assert shots.detect(path, ADAPTIVE)[1] == [30]


def test_other_pixel_formats_go_through_the_scaler(tmp_path, encode, scene):
    frames = scene(1, 30) + scene(2, 30)
    path = encode(tmp_path / "full.mkv", frames, qp="0")
    with shots.footage.Reader(path) as reader:
        _, frame = next(reader.frames())
        picked, shrunk = shots._pick(frame), shots._shrink(frame.reformat(format="yuv444p"))
    assert picked.shape == (60, 80, 3)
    assert shrunk.shape == (60, 80, 3)
    assert np.abs(picked.mean(axis=(0, 1)) - shrunk.mean(axis=(0, 1))).max() < 12
