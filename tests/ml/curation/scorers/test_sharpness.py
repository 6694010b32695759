import cv2
import numpy as np
import pytest

from ml.curation.footage import Footage
from ml.curation.scorers.sharpness import Sharpness


def footage(picture: np.ndarray) -> Footage:
    frames = np.stack([picture] * 3)
    return Footage(frames, frames, 1 / 12)


def test_blur_lowers_the_score_step_by_step(texture):
    picture = texture(1)
    scores = [Sharpness().score(footage(cv2.GaussianBlur(picture, (0, 0), sigma))) for sigma in (0.1, 2, 6)]
    assert scores[0] > 1.5 * scores[1] > 3 * scores[2]


def test_a_flat_field_has_no_detail():
    assert Sharpness().score(footage(np.full((120, 160, 3), 90, np.uint8))) == 0


def test_twice_the_resolution_of_the_same_picture_scores_alike(texture):
    picture = texture(2)
    double = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    assert Sharpness().score(footage(double)) == pytest.approx(Sharpness().score(footage(picture)), rel=0.15)
