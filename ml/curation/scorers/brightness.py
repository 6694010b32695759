"""Brightness: is the clip black, white, or something to look at?"""

from ml.curation.footage import Footage, gray


class Brightness:
    """Mean luma (ITU-R BT.601) over all glimpses and pixels, 0 black to 255 white."""

    name = "brightness"
    revision = "luma-1"
    unit = "mean luma, 0 to 255"

    def score(self, footage: Footage) -> float:
        """Mean luma of the clip."""
        return float(sum(gray(frame).mean() for frame in footage.first) / len(footage.first))
