"""Motion: how fast the picture moves, by dense optical flow."""

import cv2
import numpy as np
import numpy.typing as npt

from ml.curation.footage import Footage, Pixels, gray

WIDTH_PX = 320

Flow = npt.NDArray[np.float32]


class Motion:
    """Speed of the picture in pixels per second at a width of 320 px.

    Mean length of the DIS flow (Kroeger et al., ECCV 2016) over all pixels of a pair of frames about 1/12 s apart,
    divided by that time, median over the pairs. Divide by 320 for picture widths per second.
    """

    name = "motion"
    revision = f"dis-fast-{WIDTH_PX}-1"
    unit = "px per second at 320 px width"

    def score(self, footage: Footage) -> float:
        """Median speed of the clip's glimpses."""
        lengths = [float(np.hypot(flow[..., 0], flow[..., 1]).mean()) for flow in flows(footage)]
        return float(np.median(lengths)) / footage.interval_seconds


def flows(footage: Footage) -> list[Flow]:
    """Displacement (x right, y down) within each glimpse, pixels at a width of 320, float32 [H, 320, 2]."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    pairs = zip(footage.first, footage.second, strict=True)
    return [np.asarray(dis.calc(_small(a), _small(b), None), dtype=np.float32) for a, b in pairs]  # type: ignore[call-overload]


def _small(frame: Pixels) -> Pixels:
    height, width = frame.shape[:2]
    size = (WIDTH_PX, max(16, round(height * WIDTH_PX / width)))
    method = cv2.INTER_AREA if width > WIDTH_PX else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(gray(frame), size, interpolation=method), dtype=np.uint8)
