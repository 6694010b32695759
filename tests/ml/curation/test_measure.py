import cv2
import numpy as np
import pytest

from ml.curation.footage import Footage
from ml.curation.measure import camera_of, colours_of, vertical_colours


def moved(texture, dx: float = 0, dy: float = 0, zoom: float = 1.0) -> Footage:
    """Four pairs; the second frame shows the picture shifted by dx, dy pixels at 320 px width and grown by zoom."""
    firsts, seconds = [], []
    for seed in range(4):
        picture = cv2.resize(texture(seed), (480, 360))
        matrix = np.array([[zoom, 0, 240 * (1 - zoom) + dx], [0, zoom, 180 * (1 - zoom) + dy]], np.float32)
        after = cv2.warpAffine(picture, matrix, (480, 360), flags=cv2.INTER_CUBIC)
        firsts.append(picture[90:270, 80:400])
        seconds.append(after[90:270, 80:400])
    return Footage(np.stack(firsts), np.stack(seconds), 1 / 12)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "still"),
        ({"dx": 4}, "pans left"),
        ({"dx": -4}, "pans right"),
        ({"dy": 4}, "tilts up"),
        ({"dy": -4}, "tilts down"),
        ({"zoom": 1.03}, "zooms in"),
        ({"zoom": 0.97}, "zooms out"),
    ],
)
def test_camera_movement_is_named_by_how_the_picture_moves(texture, change, kind):
    assert camera_of(moved(texture, **change)).kind == kind


def test_speed_is_in_picture_widths_per_second(texture):
    assert camera_of(moved(texture, dx=4)).speed == pytest.approx(4 / 320 * 12, rel=0.1)


def test_an_object_that_moves_before_a_still_camera_is_no_pan(texture):
    still = moved(texture)
    second = still.second.copy()
    second[:, 60:120, 108:168] = still.first[:, 60:120, 100:160]
    assert camera_of(Footage(still.first, second, 1 / 12)).kind == "still"


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((220, 30, 30), "red"),
        ((30, 200, 40), "green"),
        ((30, 60, 220), "blue"),
        ((240, 220, 40), "yellow"),
        ((250, 140, 20), "orange"),
        ((110, 60, 20), "brown"),
        ((10, 60, 15), "dark green"),
        ((245, 245, 245), "white"),
        ((120, 120, 124), "gray"),
        ((5, 5, 8), "black"),
        ((255, 0, 20), "red"),
    ],
)
def test_colours_have_their_common_names(rgb, name):
    assert colours_of(np.full((90, 160, 3), rgb, np.uint8)) == (name,)


def test_colours_come_by_share_and_small_patches_are_not_named():
    frame = np.full((90, 160, 3), (30, 60, 220), np.uint8)
    frame[60:] = (30, 200, 40)
    frame[:10, :10] = (220, 30, 30)
    assert colours_of(frame) == ("blue", "green")
    assert vertical_colours(frame) == ("blue", "green")
