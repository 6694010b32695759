"""VBench's 16 dimensions: bounds, weights, weight files, the official total, and one formula that we compute as well.

Bounds, weights and the aggregation are those of VBench's scripts/constant.py and scripts/cal_final_score.py (version
0.1.5); file locations are below VBench's cache folder, as its utils.py names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

QUALITY_SHARE, SEMANTIC_SHARE = 4, 1
DETECTRON = "it imports detectron2, which is not in the Python package index, and needs grit_b_densecap_objectdet.pth"
STANDARD_ONLY = "VBench judges it on its own standard prompt suite only, not on a prompt set of ours"


class DimensionError(ValueError):
    """A dimension that VBench does not have, a total that cannot be formed, or a video that cannot be read."""


@dataclass(frozen=True)
class Dimension:
    """One dimension: score bounds for normalisation, weight in its group, weight files it needs, why it cannot run.

    `obstacle` is empty when the dimension runs on any video as soon as its `files` are in the cache folder.
    """

    name: str
    group: Literal["quality", "semantic"]
    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0
    files: tuple[str, ...] = ()
    obstacle: str = ""

    def normalise(self, score: float) -> float:
        """Score on the scale of the official table: 0 at `minimum`, 1 at `maximum`, not clamped."""
        return (score - self.minimum) / (self.maximum - self.minimum)


_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_DINO = ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main/hubconf.py")
_AESTHETIC = (_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
_MUSIQ = "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"
_UMT = "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"
_VICLIP = "ViCLIP/ViClip-InternVid-10M-FLT.pth"
_GRIT = "grit_model/grit_b_densecap_objectdet.pth"
_TAG = "caption_model/tag2text_swin_14m.pth"

_TABLE = (
    Dimension("subject_consistency", "quality", 0.1462, files=_DINO),
    Dimension("background_consistency", "quality", 0.2615, files=(_CLIP_B,)),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975, files=("amt_model/amt-s.pth",)),
    Dimension("dynamic_degree", "quality", weight=0.5, files=("raft_model/models/raft-things.pth",)),
    Dimension("aesthetic_quality", "quality", files=_AESTHETIC),
    Dimension("imaging_quality", "quality", files=(_MUSIQ,)),
    Dimension("object_class", "semantic", files=(_GRIT,), obstacle=DETECTRON),
    Dimension("multiple_objects", "semantic", files=(_GRIT,), obstacle=DETECTRON),
    Dimension("human_action", "semantic", files=(_UMT,), obstacle=STANDARD_ONLY),
    Dimension("color", "semantic", files=(_GRIT,), obstacle=DETECTRON),
    Dimension("spatial_relationship", "semantic", files=(_GRIT,), obstacle=DETECTRON),
    Dimension("scene", "semantic", 0.0, 0.8222, files=(_TAG,), obstacle=STANDARD_ONLY),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, files=(_CLIP_B,), obstacle=STANDARD_ONLY),
    Dimension("temporal_style", "semantic", 0.0, 0.364, files=(_VICLIP,)),
    Dimension("overall_consistency", "semantic", 0.0, 0.364, files=(_VICLIP,)),
)
DIMENSIONS: Mapping[str, Dimension] = {dimension.name: dimension for dimension in _TABLE}


@dataclass(frozen=True)
class Total:
    """VBench's three headline numbers, as fractions of 1."""

    quality: float
    semantic: float
    total: float


def dimension(name: str) -> Dimension:
    """The dimension of this name; raises DimensionError listing all of them."""
    if name not in DIMENSIONS:
        raise DimensionError(f"VBench has no dimension {name!r}; it has: {', '.join(DIMENSIONS)}")
    return DIMENSIONS[name]


def total(scores: Mapping[str, float]) -> Total:
    """Quality, semantic and total = (4 quality + semantic) / 5 from raw scores of all 16 dimensions.

    Raises DimensionError when any is missing: VBench itself counts a missing dimension as 0, which looks like a bad
    model instead of an incomplete measurement.
    """
    for name in scores:
        dimension(name)
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        raise DimensionError(f"no VBench total without all 16 dimensions; missing: {', '.join(missing)}")
    quality, semantic = (_group(scores, group) for group in ("quality", "semantic"))
    share = QUALITY_SHARE + SEMANTIC_SHARE
    return Total(quality, semantic, (QUALITY_SHARE * quality + SEMANTIC_SHARE * semantic) / share)


def temporal_flickering(video_path: Path) -> float:
    """Our own reading of the flickering score of one video, to check VBench's: 1 - mean |frame - next frame| / 255.

    Frames are 8-bit BGR as OpenCV decodes them. Raises DimensionError for a video with fewer than two frames.
    """
    import cv2

    capture = cv2.VideoCapture(str(video_path))
    differences: list[float] = []
    has_frame, previous = capture.read()
    while has_frame:
        has_frame, frame = capture.read()
        if has_frame:
            differences.append(float(np.abs(frame.astype(np.float32) - previous).mean(dtype=np.float64)))
            previous = frame
    capture.release()
    if not differences:
        raise DimensionError(f"{video_path} has fewer than two readable frames: flickering compares neighbours")
    return 1.0 - float(np.mean(differences)) / 255.0


def _group(scores: Mapping[str, float], group: str) -> float:
    members = [d for d in DIMENSIONS.values() if d.group == group]
    return sum(d.weight * d.normalise(scores[d.name]) for d in members) / sum(d.weight for d in members)
