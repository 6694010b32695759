"""Derived columns, by hand-made rows."""

import pandas as pd

from evaluation.derived import LONG_VIDEO_CLIPS, derive
from ml.recipe import Recipe


def _examples(videos: list[str], splits: list[str]) -> pd.DataFrame:
    names = [f"{i:064x}" for i in range(len(videos))]
    rows = {"clip_id": names, "sha256": names, "video_id": videos, "split": splits, "tiers": "base finest"}
    return pd.DataFrame(rows)


def test_a_short_video_in_both_splits_shows_and_a_long_one_may():
    recipe = Recipe.load("v2_0")
    long = ["l"] * LONG_VIDEO_CLIPS
    frame = _examples(["s", "s", *long], ["train", "holdout", *(["train"] * (len(long) - 1)), "holdout"])
    derived = derive("examples", frame, recipe)
    assert derived["splits_of_short_video"].tolist() == [2, 2] + [1] * len(long)
    assert derived["in_high"].tolist() == [0.0] * len(frame)
    assert derived["in_finest"].eq(1.0).all()
    assert derived["is_holdout"].sum() == 2


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
