"""Splits, tiers and the data card."""

from typing import Any

import pandas as pd
import pytest

from ml.curation.examples import DatasetError, build_examples, data_card
from ml.recipe import Recipe


def tables(recipe: Recipe, long: int = 60, short: int = 4) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One long and several short videos; sharpness rises from clip to clip, every fifth clip is dropped."""
    rows: list[dict[str, Any]] = []
    for video, count in [("film", long), *((f"live{i}", short) for i in range(6))]:
        for index in range(count):
            rows.append(
                {
                    "clip_id": f"{video}-{index:03}",
                    "video_id": video,
                    "shot_id": f"{video}-{index // 2}",
                    "start_seconds": float(index),
                    "path": f"clips/{video}-{index}.mp4",
                    "sha256": f"{len(rows):064x}",
                    "width": 320,
                    "height": 180,
                    "fps": 12.0,
                    "num_frames": 24,
                    "licence": "CC0-1.0",
                    "keep": index % 5 != 4,
                    "reason": "" if index % 5 != 4 else "motion 0.0 < 0.02",
                    "duplicate_of": "",
                    **{score: 100.0 + 10 * index for score in recipe.curation.scores},
                }
            )
    curated = pd.DataFrame(rows)
    return curated, curated[["clip_id"]].assign(caption="a rabbit in a meadow")


def test_kept_clips_become_examples_and_no_video_leaks(tiny_recipe: Recipe) -> None:
    curated, captions = tables(tiny_recipe)
    examples = build_examples(tiny_recipe, curated, captions)
    assert set(examples["clip_id"]) == set(curated[curated["keep"]]["clip_id"])
    film = examples[examples["video_id"] == "film"].sort_values("clip_id")
    held = [index for index, split in enumerate(film["split"]) if split == "holdout"]
    assert held == list(range(held[0], held[-1] + 1)), "the held-out block of a long video must be unbroken"
    shots = film.groupby("shot_id")["split"]
    assert (shots.nunique() == 1).all(), "no shot stands in both splits"
    assert (shots.first() == "holdout").sum() == round(shots.ngroups * tiny_recipe.dataset.holdout_fraction)
    for _, short in examples[examples["video_id"] != "film"].groupby("video_id"):
        assert short["split"].nunique() == 1


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows(tiny_recipe: Recipe) -> None:
    curated, captions = tables(tiny_recipe)
    shuffled = curated.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(
        build_examples(tiny_recipe, curated, captions), build_examples(tiny_recipe, shuffled, captions)
    )
    other = tiny_recipe.model_copy(update={"seed": 7})
    before, after = (build_examples(r, curated, captions)["split"] for r in (tiny_recipe, other))
    assert list(before) != list(after)


def test_a_long_videos_last_shots_can_be_held_out_too(tiny_recipe: Recipe) -> None:
    curated, captions = tables(tiny_recipe, long=42, short=0)
    recipes = [tiny_recipe.model_copy(update={"seed": seed}) for seed in range(80)]
    splits = [list(build_examples(recipe, curated, captions)["split"]) for recipe in recipes]
    for place in (0, -1):
        assert {split[place] for split in splits} == {"train", "holdout"}


def test_an_empty_tier_names_the_threshold_to_relax(tiny_recipe: Recipe) -> None:
    curated, captions = tables(tiny_recipe)
    with pytest.raises(DatasetError, match=r"relax dataset\.tiers\."):
        build_examples(tiny_recipe, curated.assign(sharpness=0.0), captions)


def test_the_card_counts_what_was_kept_and_dropped(tiny_recipe: Recipe) -> None:
    curated, captions = tables(tiny_recipe)
    card = data_card(tiny_recipe, build_examples(tiny_recipe, curated, captions), curated)
    assert f"| motion | {int((~curated['keep']).sum())} |" in card
    assert f"| CC0-1.0 | {int(curated['keep'].sum())} |" in card
