"""Columns that suites look at and tables do not hold: words of a caption, splits of a video, short side of a clip."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from ml.curation.examples import LONG_VIDEO_SHOTS
from ml.recipe import Recipe

Columns = dict[str, "pd.Series[Any]"]


def derive(table_name: str, frame: pd.DataFrame, recipe: Recipe | None) -> pd.DataFrame:
    """The frame with the extra columns of its table; raises KeyError when a column they are made of is missing."""
    if table_name in _ALONE:
        return frame.assign(**_ALONE[table_name](frame))
    if table_name in _UNDER_RECIPE and recipe is not None:
        return frame.assign(**_UNDER_RECIPE[table_name](frame, recipe))
    return frame


def _of_videos(frame: pd.DataFrame) -> Columns:
    return {"is_ok": (frame["status"] == "ok").astype("float64")}


def _of_shots(frame: pd.DataFrame) -> Columns:
    return {"shot_seconds": frame["end_seconds"] - frame["start_seconds"]}


def _of_clips(frame: pd.DataFrame) -> Columns:
    return {**_of_videos(frame), "short_side_px": frame[["width", "height"]].min(axis=1)}


def _of_curated(frame: pd.DataFrame) -> Columns:
    return {"is_kept": frame["keep"].astype("float64")}


def _of_captions(frame: pd.DataFrame) -> Columns:
    return {"caption_words": frame["caption"].str.split().str.len()}


def _of_examples(frame: pd.DataFrame, recipe: Recipe) -> Columns:
    long = frame.groupby("video_id")["shot_id"].transform("nunique") >= LONG_VIDEO_SHOTS
    members = {f"in_{t.name}": frame["tiers"].str.split().map(_holds(t.name)) for t in recipe.dataset.tiers}
    return {
        **members,
        "splits_of_short_video": _splits_per(frame, "video_id").mask(long, 1),
        "split_changes_of_video": _split_changes(frame),
        "splits_of_shot": _splits_per(frame, "shot_id"),
        "splits_of_file": _splits_per(frame, "sha256"),
        "is_holdout": (frame["split"] == "holdout").astype("float64"),
    }


def _of_latents(frame: pd.DataFrame, recipe: Recipe) -> Columns:
    return {
        "bucket": frame["resolution"] + "/" + frame["frames"].astype("str"),
        "splits_of_clip": _splits_per(frame, "clip_id"),
        "height_rest": frame["height"] % recipe.strides.pixels,
        "width_rest": frame["width"] % recipe.strides.pixels,
    }


def _splits_per(frame: pd.DataFrame, key: str) -> "pd.Series[Any]":
    return frame.groupby(key)["split"].transform("nunique")


def _split_changes(frame: pd.DataFrame) -> "pd.Series[Any]":
    """How often the split changes along a video: one held-out block has at most two ends."""
    ordered = frame.sort_values(["video_id", "start_seconds"])
    video = ordered["video_id"]
    changed = (ordered["split"] != ordered["split"].shift()) & (video == video.shift())
    return changed.groupby(video).transform("sum").reindex(frame.index)


def _holds(tier: str) -> Callable[[list[str]], float]:
    return lambda names: float(tier in names)


_ALONE: dict[str, Callable[[pd.DataFrame], Columns]] = {
    "videos": _of_videos,
    "shots": _of_shots,
    "clips": _of_clips,
    "curated": _of_curated,
    "captions": _of_captions,
}
_UNDER_RECIPE: dict[str, Callable[[pd.DataFrame, Recipe], Columns]] = {"examples": _of_examples, "latents": _of_latents}
