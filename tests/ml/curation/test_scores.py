import numpy as np

from infra.workspace import Workspace
from ml.curation import scores
from ml.curation.dedup import distance
from ml.curation.scorers import registry


def test_one_row_holds_every_score_with_its_revision(tmp_path, encode, scene):
    encode(tmp_path / "a.mp4", scene(1, 24, dx=2), fps=24)
    chosen = registry.build(("motion", "sharpness", "brightness"))
    clip = {"clip_id": "0" * 16, "path": "a.mp4", "num_frames": 24, "fps": 24.0}
    row = scores.score_clip(clip, chosen, Workspace(tmp_path))
    table = scores.tabulate([row], chosen)
    assert table.motion[0] > 20
    assert table.motion_revision[0] == "dis-fast-320-1"
    assert len(table["hash"][0]) == 16


def test_no_clips_give_a_table_with_every_column():
    chosen = registry.build(("motion", "brightness"))
    table = scores.tabulate([], chosen)
    assert list(table.columns) == ["clip_id", "hash", "motion", "brightness", "motion_revision", "brightness_revision"]


def test_hashes_are_near_for_near_pictures_and_far_for_others(texture):
    picture = texture(1)
    brighter = np.clip(picture.astype(int) + 20, 0, 255).astype(np.uint8)
    first = scores.perceptual_hash(picture)
    assert distance(first, scores.perceptual_hash(brighter)) <= 4
    assert distance(first, scores.perceptual_hash(texture(2))) > 15
