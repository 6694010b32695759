"""Text area: titles, credits, subtitles and watermarks that a model would learn to paint."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ml.curation.footage import Footage, Pixels

Box = npt.NDArray[np.float32]

LONG_SIDE_PX = 640
BOX_THRESHOLD = 0.6
FRAMES = 2
TALL_SHARE = 0.12
READABLE_CHARACTERS = 2


class TextArea:
    """Share of the frame that text boxes cover, 0 to 1: the larger of two frames, a third and two thirds through.

    Detector and reader: PP-OCRv6 small, whose weights come inside the rapidocr package. Frames are shrunk to 640 px on
    their longer side; boxes below a confidence of 0.6 do not count. The detector takes flat skies and blurred fur for
    one huge line of text, so a frame with a box taller than 12 % of it counts only what can also be read (2 characters
    or more, confidence 0.5). One inference thread, because clips already run side by side.
    """

    name = "text_area"
    revision = f"pp-ocrv6-small-{LONG_SIDE_PX}-{BOX_THRESHOLD}-{TALL_SHARE}-1"
    unit = "share of the frame"

    def __init__(self) -> None:
        """Prepare the engines; their weights are read on first use."""
        self._detect, self._read = _engine(read=False), _engine(read=True)

    def score(self, footage: Footage) -> float:
        """Largest share of a frame under text."""
        count = len(footage.first)
        chosen = sorted({count * (i + 1) // (FRAMES + 1) for i in range(FRAMES)})
        return max(self._share(footage.first[min(index, count - 1)]) for index in chosen)

    def _share(self, frame: Pixels) -> float:
        height, width = frame.shape[:2]
        bgr = np.ascontiguousarray(frame[..., ::-1])
        boxes = _boxes(self._detect(bgr, use_cls=False, use_rec=False))
        if any(np.ptp(box[:, 1]) > TALL_SHARE * height for box in boxes):
            boxes = _readable(self._read(bgr, use_cls=False))
        return covered(boxes, height, width)


def covered(boxes: list[Box], height: int, width: int) -> float:
    """Share of a height x width picture inside at least one of the quadrilaterals [4, 2] (x, y)."""
    mask = np.zeros((height, width), np.uint8)
    for box in boxes:
        cv2.fillPoly(mask, [np.round(box).astype(np.int32)], 1)
    return float(mask.mean())


def _boxes(found: Any) -> list[Box]:
    return [] if found.boxes is None else [np.asarray(box, dtype=np.float32) for box in found.boxes]


def _readable(found: Any) -> list[Box]:
    lengths = [sum(map(str.isalnum, text)) for text in found.txts or ()]
    return [box for box, length in zip(_boxes(found), lengths, strict=True) if length >= READABLE_CHARACTERS]


def _engine(read: bool) -> Any:
    """Two engines, because one keeps the kind of its latest call in itself and several threads call at once."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.use_rec": read,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": LONG_SIDE_PX,
            "Det.box_thresh": BOX_THRESHOLD,
        }
    )
