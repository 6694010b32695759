import numpy as np
import pytest

from ml.curation.footage import Footage
from ml.curation.scorers.motion import Motion


def shifted(texture, pixels: int, interval: float, scale: int = 1) -> Footage:
    pictures = [np.kron(texture(seed)[:200, :400], np.ones((scale, scale, 1), np.uint8)) for seed in range(4)]
    width, step = 320 * scale, pixels * scale
    first = np.stack([picture[:, 40:][:, :width] for picture in pictures])
    second = np.stack([picture[:, 40 - step :][:, :width] for picture in pictures])
    return Footage(first, second, interval)


def test_speed_is_pixels_per_second_at_320(texture):
    assert Motion().score(shifted(texture, 5, 1 / 12)) == pytest.approx(60, rel=0.1)


def test_speed_depends_neither_on_resolution_nor_on_the_interval(texture):
    slow = Motion().score(shifted(texture, 4, 1 / 10))
    assert Motion().score(shifted(texture, 8, 2 / 10)) == pytest.approx(slow, rel=0.1)
    assert Motion().score(shifted(texture, 4, 1 / 10, scale=2)) == pytest.approx(slow, rel=0.1)


def test_a_still_picture_does_not_move(texture):
    assert Motion().score(shifted(texture, 0, 1 / 12)) < 0.05
