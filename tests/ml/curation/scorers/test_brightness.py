import numpy as np
import pytest

from ml.curation.footage import Footage
from ml.curation.scorers.brightness import Brightness


@pytest.mark.parametrize(("colour", "luma"), [((0, 0, 0), 0), ((255, 255, 255), 255), ((0, 255, 0), 0.587 * 255)])
def test_brightness_is_luma(colour, luma):
    frames = np.full((3, 60, 80, 3), colour, np.uint8)
    assert Brightness().score(Footage(frames, frames, 1 / 12)) == pytest.approx(luma, abs=0.6)


def test_it_is_the_mean_over_glimpses():
    frames = np.stack([np.full((60, 80, 3), value, np.uint8) for value in (0, 200)])
    assert Brightness().score(Footage(frames, frames, 1 / 12)) == pytest.approx(100, abs=0.6)
