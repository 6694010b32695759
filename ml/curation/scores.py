"""The scoring pass: every clip decoded once, all scorers and the perceptual hash on the same frames."""

from typing import Any

import imagehash
import numpy as np
import pandas as pd
from PIL import Image

from infra.workspace import Workspace
from ml.curation.footage import Footage, Pixels
from ml.curation.scorers.scorer import Scorer
from ml.manifest import SCORES


def score_clip(clip: dict[str, Any], scorers: tuple[Scorer, ...], workspace: Workspace) -> dict[str, Any]:
    """One row of the scores table; raises FootageError when the clip file cannot be read."""
    path = workspace.resolve(clip["path"])
    footage = Footage.read(path, int(clip["num_frames"]), float(clip["fps"]))
    row: dict[str, Any] = {"clip_id": clip["clip_id"], "hash": perceptual_hash(footage.middle)}
    for scorer in scorers:
        row |= {scorer.name: scorer.score(footage), f"{scorer.name}_revision": scorer.revision}
    return row


def tabulate(rows: list[dict[str, Any]], scorers: tuple[Scorer, ...]) -> pd.DataFrame:
    """The scores table, with its columns even where no clip was scored."""
    if rows:
        return SCORES.conform(pd.DataFrame(rows))
    columns = {scorer.name: pd.Series(dtype="float64") for scorer in scorers}
    revisions = {f"{scorer.name}_revision": pd.Series(dtype="str") for scorer in scorers}
    return SCORES.empty().assign(**columns, **revisions)


def perceptual_hash(frame: Pixels) -> str:
    """64-bit DCT hash of an RGB frame, 16 hex digits: near pictures differ in few bits (imagehash's `phash`)."""
    return str(imagehash.phash(Image.fromarray(np.ascontiguousarray(frame))))
