"""Derived columns, by hand-made rows."""

import pandas as pd

from evaluation.derived import derive
from ml.curation.examples import LONG_VIDEO_SHOTS
from ml.recipe import Recipe


def _examples(videos: list[str], splits: list[str]) -> pd.DataFrame:
    names = [f"{i:064x}" for i in range(len(videos))]
    rows = {"clip_id": names, "sha256": names, "video_id": videos, "split": splits, "tiers": "base finest"}
    return pd.DataFrame(rows).assign(shot_id=names, start_seconds=[float(i) for i in range(len(names))])


def test_a_short_video_in_both_splits_shows_and_a_long_one_may():
    recipe = Recipe.load("v2_0")
    long = ["l"] * LONG_VIDEO_SHOTS
    frame = _examples(["s", "s", *long], ["train", "holdout", *(["train"] * (len(long) - 1)), "holdout"])
    derived = derive("examples", frame, recipe)
    assert derived["splits_of_short_video"].tolist() == [2, 2] + [1] * len(long)
    assert derived["in_high"].tolist() == [0.0] * len(frame)
    assert derived["in_finest"].eq(1.0).all()
    assert derived["is_holdout"].sum() == 2


def test_a_block_has_two_ends_and_a_shot_one_split():
    count = LONG_VIDEO_SHOTS
    block = ["holdout" if 3 <= i < 6 else "train" for i in range(count)]
    scattered = ["holdout" if i in (3, 7) else "train" for i in range(count)]
    for splits, changes in ((block, 2), (scattered, 4)):
        frame = _examples(["l"] * count, splits).sample(frac=1, random_state=1)
        derived = derive("examples", frame, Recipe.load("v2_0"))
        assert derived["split_changes_of_video"].eq(changes).all()
        assert derived["splits_of_shot"].eq(1).all()
    torn = _examples(["l", "l"], ["train", "holdout"]).assign(shot_id="one")
    assert derive("examples", torn, Recipe.load("v2_0"))["splits_of_shot"].tolist() == [2, 2]


def test_the_same_file_in_both_splits_shows():
    frame = _examples(["a", "b"], ["train", "holdout"]).assign(sha256="same")
    assert derive("examples", frame, Recipe.load("v2_0"))["splits_of_file"].tolist() == [2, 2]


def test_words_and_short_side():
    captions = pd.DataFrame({"caption": ["two words", "", "  one "]})
    assert derive("captions", captions, None)["caption_words"].tolist() == [2, 0, 1]
    clips = pd.DataFrame({"status": ["ok", "rejected"], "width": [320, 0], "height": [240, 0]})
    derived = derive("clips", clips, None)
    assert derived["short_side_px"].tolist() == [240, 0]
    assert derived["is_ok"].tolist() == [1.0, 0.0]


def test_latent_bucket_and_remainders():
    row = {"resolution": "64px", "frames": 17, "height": 48, "width": 72, "clip_id": "a", "split": "train"}
    derived = derive("latents", pd.DataFrame([row]), Recipe.load("v2_0"))
    assert derived["bucket"].tolist() == ["64px/17"]
    assert (derived["height_rest"].item(), derived["width_rest"].item()) == (0, 8)
