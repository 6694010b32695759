"""The door to VBench: honest about what is absent, and equal to our own reading of the formula where it is real."""

from pathlib import Path

import av
import numpy as np
import pytest

from evaluation.dimensions import DIMENSIONS, DimensionError, dimension, temporal_flickering
from evaluation.vbench import VBenchError, VBenchResult, evaluate, obstacle


def _write(path: Path, step_px: int, num_frames: int = 17, fps: int = 12) -> None:
    picture = np.random.default_rng(step_px).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(num_frames):
            frame = np.ascontiguousarray(np.roll(picture, i * step_px, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_without_weights_everything_asked_for_is_absent_with_the_file_it_needs(tmp_path):
    _write(tmp_path / "0-0.mp4", 1)
    result = evaluate(tmp_path, ["motion_smoothness"], tmp_path, tmp_path / "cache")
    assert set(result.dimensions) == set(DIMENSIONS)
    assert result.scores == {}
    assert "amt_model/amt-s.pth" in result.absent["motion_smoothness"]
    assert "detectron2" in result.absent["color"]
    assert "not asked for" in result.absent["temporal_flickering"]
    stored = VBenchResult.from_json(result.as_json())
    assert stored == result
    assert (tmp_path / "vbench.json").is_file()


def test_a_weight_file_removes_the_obstacle_of_its_dimension_only(tmp_path):
    assert obstacle(dimension("dynamic_degree"), tmp_path)
    (tmp_path / "raft_model" / "models").mkdir(parents=True)
    (tmp_path / "raft_model" / "models" / "raft-things.pth").touch()
    assert obstacle(dimension("dynamic_degree"), tmp_path) == ""
    assert obstacle(dimension("motion_smoothness"), tmp_path)


def test_long_videos_get_a_note(tmp_path):
    _write(tmp_path / "0-0.mp4", 1, num_frames=60)
    _write(tmp_path / "1-0.mp4", 1, num_frames=59)
    notes = evaluate(tmp_path, ["scene"], tmp_path, tmp_path / "cache").notes
    assert any(note.startswith("1 of 2 videos last 5 s or more") for note in notes)


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(VBenchError, match=r"no \.mp4"):
        evaluate(tmp_path, ["temporal_flickering"], tmp_path, tmp_path)
    with pytest.raises(DimensionError, match="no dimension"):
        evaluate(tmp_path, ["flicker"], tmp_path, tmp_path)


@pytest.mark.slow
def test_vbench_itself_agrees_with_our_reading_of_temporal_flickering(tmp_path):
    """Slow: makes .venv-vbench when it is not there, and imports VBench in a process of its own."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for step_px in range(3):
        _write(videos / f"{step_px}-0.mp4", step_px)
    result = evaluate(videos, ["temporal_flickering"], tmp_path / "out", tmp_path / "cache")
    real = result.dimensions["temporal_flickering"]
    assert real.status == "real"
    ours = {path.name: temporal_flickering(path) for path in videos.glob("*.mp4")}
    assert dict(real.per_video) == pytest.approx(ours, abs=1e-6)
    assert real.score == pytest.approx(np.mean(list(ours.values())), abs=1e-6)
    assert ours["0-0.mp4"] > ours["1-0.mp4"] > ours["2-0.mp4"] - 0.05
    assert result.versions["vbench"] == "0.1.5"
