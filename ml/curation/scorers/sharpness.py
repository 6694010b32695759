"""Sharpness: fine detail in the picture, low for blur, heavy compression and flat fields."""

import cv2
import numpy as np

from ml.curation.footage import Footage, Pixels, gray

SHORT_SIDE_PX = 240


class Sharpness:
    """Variance of the Laplacian of luma at a shorter side of 240 px, median over glimpses.

    The common size makes clips of different resolutions comparable; smaller clips are not enlarged. The measure is
    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.
    """

    name = "sharpness"
    revision = f"laplacian-{SHORT_SIDE_PX}-1"
    unit = "variance of the Laplacian of luma at 240 px"

    def score(self, footage: Footage) -> float:
        """Median detail of the clip's glimpses."""
        return float(np.median([_detail(frame) for frame in footage.first]))


def _detail(frame: Pixels) -> float:
    return float(cv2.Laplacian(gray(frame, SHORT_SIDE_PX), cv2.CV_64F).var())
