import cv2
import numpy as np
import pytest

from ml.curation.footage import Footage
from ml.curation.scorers.text_area import TextArea, covered


@pytest.fixture(scope="module")
def scorer() -> TextArea:
    return TextArea()


def footage(picture: np.ndarray) -> Footage:
    frames = np.stack([picture] * 3)
    return Footage(frames, frames, 1 / 12)


def write(picture: np.ndarray, lines: list[str], size: float) -> np.ndarray:
    for number, line in enumerate(lines):
        cv2.putText(picture, line, (20, 60 + 40 * number), cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), 2)
    return picture


def test_a_clip_without_text_scores_zero(scorer, texture):
    assert scorer.score(footage(texture(1)[:240, :420])) == 0
    assert scorer.score(footage(np.full((240, 420, 3), 140, np.uint8))) == 0


def test_credits_score_by_the_area_they_cover(scorer):
    ground = np.full((240, 420, 3), 30, np.uint8)
    one = scorer.score(footage(write(ground.copy(), ["DIRECTED BY SOMEBODY"], 0.8)))
    three = scorer.score(
        footage(write(ground.copy(), ["DIRECTED BY SOMEBODY", "MUSIC BY NOBODY", "THE END OF IT"], 0.8))
    )
    assert 0.03 < one < 0.15
    assert three > 2 * one


def test_a_large_title_counts_because_it_can_be_read(scorer):
    title = np.full((240, 420, 3), 30, np.uint8)
    cv2.putText(title, "BUNNY", (20, 150), cv2.FONT_HERSHEY_DUPLEX, 3.4, (255, 255, 255), 8)
    assert scorer.score(footage(title)) > 0.15


def test_boxes_that_overlap_are_counted_once():
    box = np.array([[0, 0], [49, 0], [49, 49], [0, 49]], np.float32)
    assert covered([box, box], 100, 100) == pytest.approx(0.25)
    assert covered([], 100, 100) == 0
