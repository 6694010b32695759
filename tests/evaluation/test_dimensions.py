"""VBench's constants and total, checked against closed forms and published sums."""

from pathlib import Path

import av
import numpy as np
import pytest

from evaluation.dimensions import DIMENSIONS, DimensionError, dimension, temporal_flickering, total


def test_there_are_seven_quality_and_nine_semantic_dimensions():
    groups = [d.group for d in DIMENSIONS.values()]
    assert (groups.count("quality"), groups.count("semantic")) == (7, 9)
    assert sum(d.weight for d in DIMENSIONS.values() if d.group == "quality") == 6.5


def test_maxima_give_one_and_minima_give_zero():
    best = total({name: d.maximum for name, d in DIMENSIONS.items()})
    assert (best.quality, best.semantic, best.total) == pytest.approx((1, 1, 1))
    worst = total({name: d.minimum for name, d in DIMENSIONS.items()})
    assert (worst.quality, worst.semantic, worst.total) == pytest.approx((0, 0, 0))


def test_quality_counts_four_times_and_dynamic_degree_half():
    scores = {name: d.minimum for name, d in DIMENSIONS.items()}
    quality = {n: d.maximum for n, d in DIMENSIONS.items() if d.group == "quality"}
    assert total({**scores, **quality}).total == pytest.approx(0.8)
    assert total({**scores, "dynamic_degree": 1.0}).quality == pytest.approx(0.5 / 6.5)
    assert total({**scores, "temporal_flickering": 0.81465}).quality == pytest.approx(0.5 / 6.5)


def test_a_missing_dimension_is_an_error_and_not_a_zero():
    scores = {name: d.maximum for name, d in DIMENSIONS.items() if name != "scene"}
    with pytest.raises(DimensionError, match="missing: scene"):
        total(scores)
    with pytest.raises(DimensionError, match="no dimension 'beauty'"):
        total({**scores, "beauty": 1.0})
    with pytest.raises(DimensionError, match="temporal_flickering"):
        dimension("flicker")


def _write(path: Path, frames: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_flickering_of_known_frames_has_its_closed_form(tmp_path):
    grey = [np.full((16, 16, 3), value, dtype=np.uint8) for value in (100, 151, 100, 100)]
    expected = 1 - (51 + 51 + 0) / 3 / 255
    assert temporal_flickering(_write(tmp_path / "grey.mp4", grey)) == pytest.approx(expected, abs=1e-6)


def test_flickering_needs_two_frames(tmp_path):
    with pytest.raises(DimensionError, match="fewer than two"):
        temporal_flickering(_write(tmp_path / "one.mp4", [np.zeros((16, 16, 3), dtype=np.uint8)]))
    with pytest.raises(DimensionError, match="fewer than two"):
        temporal_flickering(tmp_path / "missing.mp4")
