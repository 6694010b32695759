"""From curated, captioned clips to training examples: the split, the tiers, and the card that describes them.

No shot may stand in both splits: a video of many shots gives one unbroken block of them to the holdout, any other goes
whole to one side.
"""

import hashlib
from collections.abc import Iterable

import pandas as pd

from ml.manifest import EXAMPLES
from ml.recipe import Recipe
from ml.sections import Range, Tier

LONG_VIDEO_SHOTS = 20  # from which a video gives a block to each side


class DatasetError(ValueError):
    """A dataset that cannot be trained on, with the setting that leaves it empty."""


def build_examples(recipe: Recipe, curated: pd.DataFrame, captions: pd.DataFrame) -> pd.DataFrame:
    """The EXAMPLES table of the kept, captioned clips, ordered by id.

    Raises DatasetError when a tier that a stage trains on has no training example.
    """
    kept = curated[curated["keep"]].merge(captions[["clip_id", "caption"]], on="clip_id", how="inner")
    kept = kept.sort_values(["video_id", "start_seconds"], kind="stable")
    kept["split"] = [split for _, group in kept.groupby("video_id", sort=False) for split in _splits(recipe, group)]
    kept["tiers"] = [
        " ".join(t.name for t in recipe.dataset.tiers if _in_tier(row, t)) for row in kept.to_dict("records")
    ]
    columns = [*(c.name for c in EXAMPLES.columns), "shot_id", "start_seconds"]
    examples = EXAMPLES.conform(kept[columns].sort_values("clip_id"))
    for stage in recipe.phases:
        train = examples[(examples["split"] == "train") & in_tier(examples, stage.tier)]
        if train.empty:
            raise DatasetError(
                f"no training example is in tier {stage.tier!r}, which stage {stage.name} trains on: relax "
                f"dataset.tiers.{stage.tier}.thresholds or add footage ({len(examples)} examples in all)"
            )
    if not (examples["split"] == "holdout").any():
        raise DatasetError("no example is held out: raise dataset.holdout_fraction or add footage")
    return examples


def in_tier(examples: pd.DataFrame, tier: str) -> "pd.Series[bool]":
    """Which examples (or latents) a tier holds."""
    return examples["tiers"].map(lambda held: tier in held.split()).astype(bool)


def data_card(recipe: Recipe, examples: pd.DataFrame, curated: pd.DataFrame) -> str:
    """Markdown that says what the dataset is made of, under which licences, and what was dropped."""
    hours = float((examples["num_frames"] / examples["fps"]).sum()) / 3600
    dropped = curated[~curated["keep"]]["reason"].str.split(" ").str[0].value_counts()
    tiers = {t.name: int(in_tier(examples, t.name).sum()) for t in recipe.dataset.tiers}
    lines = [
        f"# Data card: {recipe.title} ({recipe.profile})",
        "",
        f"{len(examples)} clips, {hours:.3f} hours, from {examples['video_id'].nunique()} videos.",
        "",
        *_table("Licence", examples["licence"].value_counts().items()),
        *_table("Split", examples["split"].value_counts().items()),
        *_table("Tier", tiers.items()),
        *_table("Dropped because of", dropped.items()),
        "Not filled in by the pipeline: consent of people shown, known biases of the footage, contact for takedown.",
    ]
    return "\n".join(lines) + "\n"


def _splits(recipe: Recipe, group: pd.DataFrame) -> list[str]:
    """Split of every clip of one video, in time order."""
    shots, chance = list(dict.fromkeys(group["shot_id"])), _chance(recipe.seed, str(group["video_id"].iloc[0]))
    if len(shots) < LONG_VIDEO_SHOTS:
        return ["holdout" if chance < recipe.dataset.holdout_fraction else "train"] * len(group)
    block = max(1, round(len(shots) * recipe.dataset.holdout_fraction))
    start = int(chance * (len(shots) - block + 1))
    held = set(shots[start : start + block])
    return ["holdout" if shot in held else "train" for shot in group["shot_id"]]


def _chance(seed: int, video_id: str) -> float:
    """A number in [0, 1) that depends on the seed and the video only."""
    return int(hashlib.sha256(f"{seed}:{video_id}".encode()).hexdigest()[:8], 16) / 2**32


def _in_tier(row: dict[str, float], tier: Tier) -> bool:
    return all(_inside(float(row[score]), wanted) for score, wanted in tier.thresholds.items())


def _inside(value: float, wanted: Range) -> bool:
    return (wanted.min is None or value >= wanted.min) and (wanted.max is None or value <= wanted.max)


def _table(title: str, rows: Iterable[tuple[object, object]]) -> list[str]:
    return [f"| {title} | clips |", "|---|--:|", *(f"| {name} | {count} |" for name, count in rows), ""]
