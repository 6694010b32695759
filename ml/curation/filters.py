"""Filters: thresholds of the recipe laid over the scores. A dropped clip keeps its row, its scores and its reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ml.curation.dedup import distance, duplicates
from ml.manifest import CLIPS, CURATED, SCORES
from ml.sections import Keep, Range

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class FilterError(ValueError):
    """A filter that leaves nothing, saying which threshold did it and what it could be."""


@dataclass(frozen=True)
class Drop:
    """One step of the funnel: clips before it, and how many it dropped; `rule` is what it asks for, in words."""

    name: str
    rule: str
    before: int
    dropped: int

    @property
    def after(self) -> int:
        """Clips that passed."""
        return self.before - self.dropped


def gather(clip_folders: Sequence[Path], score_folders: Sequence[Path]) -> tuple[pd.DataFrame, int]:
    """Clips of all shards beside their scores, and how many rows stood there twice.

    The same video in two shards gives the same clip ids; the first shard's rows stay. Clips that were rejected when
    they were cut have no scores. Raises FilterError when a clip that was cut has none, or nothing was cut at all.
    """
    clips = pd.concat([CLIPS.read(folder) for folder in clip_folders] or [CLIPS.empty()], ignore_index=True)
    scores = pd.concat([SCORES.read(folder) for folder in score_folders] or [SCORES.empty()], ignore_index=True)
    repeated = int(clips.clip_id.duplicated().sum())
    table = clips.drop_duplicates("clip_id").merge(scores.drop_duplicates("clip_id"), on="clip_id", how="left")
    unscored = table[(table.status == "ok") & table["hash"].isna()]
    if len(unscored):
        raise FilterError(
            f"{len(unscored)} clips have no scores, {unscored.clip_id.iloc[0]} for one: score their shard"
        )
    if not (table.status == "ok").any():
        common = table.reason.mode()
        why = f"; the most frequent reason: {common.iloc[0]}" if len(common) else ""
        raise FilterError(f"there is no clip to filter: all {len(table)} were rejected when they were cut{why}")
    return table, repeated


def curate(table: pd.DataFrame, keep: Keep, licences: Sequence[str]) -> tuple[pd.DataFrame, list[Drop]]:
    """The curated table (every clip, with `keep`, `reason`, `duplicate_of`) and the funnel.

    Licences apply first (a recipe may have become stricter since the clips were cut), thresholds in the recipe's order,
    near-duplicates last, so that the one that is kept is a clip that passed.
    Raises FilterError when no clip is left, or for a threshold on a score that the table lacks.
    """
    curated = table.assign(keep=table.status == "ok", duplicate_of="", reason=table.reason)
    cut = int(curated.keep.sum())
    funnel = [Drop("cutting", "licensed, long enough, decodable", len(curated), len(curated) - cut)]
    foreign = curated.loc[curated.keep & ~curated.licence.isin(licences), "licence"]
    reasons = foreign.map(lambda licence: f"licence {licence} is not allowed by this recipe (corpus.licences)")
    funnel.append(_drop(curated, "licence", "one of corpus.licences", reasons))
    for name, limits in keep.thresholds.items():
        if name not in curated:
            raise FilterError(f"curation.keep.thresholds.{name}: the scores hold no such column")
        reasons = curated.loc[curated.keep, name].map(lambda value, n=name, r=limits: _outside(n, float(value), r))
        funnel.append(_drop(curated, name, _words(name, limits), reasons[reasons != ""]))
    _drop_duplicates(curated, keep.dedup_bits, funnel)
    if not curated.keep.any():
        raise FilterError(_advice(table[table.status == "ok"], keep, funnel))
    return CURATED.conform(curated), funnel


def quantiles(table: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Where each score lies over the clips that were cut: the numbers to choose a threshold by."""
    scored = table[table.status == "ok"]
    return {name: {f"p{q * 100:.0f}": round(float(scored[name].quantile(q)), 4) for q in QUANTILES} for name in names}


def _outside(name: str, value: float, limits: Range) -> str:
    if np.isnan(value):
        return f"{name} has no value"
    if limits.min is not None and value < limits.min:
        return f"{name} {value:.4g} is below {limits.min:g}"
    if limits.max is not None and value > limits.max:
        return f"{name} {value:.4g} is above {limits.max:g}"
    return ""


def _words(name: str, limits: Range) -> str:
    low = f"{limits.min:g} <= " if limits.min is not None else ""
    high = f" <= {limits.max:g}" if limits.max is not None else ""
    return f"{low}{name}{high}"


def _drop(curated: pd.DataFrame, name: str, rule: str, reasons: "pd.Series[str]") -> Drop:
    """Mark the rows that `reasons` names as dropped."""
    before = int(curated.keep.sum())
    curated.loc[reasons.index, "reason"] = reasons
    curated.loc[reasons.index, "keep"] = False
    return Drop(name, rule, before, len(reasons))


def _drop_duplicates(curated: pd.DataFrame, bits: int, funnel: list[Drop]) -> None:
    """Keep the sharper of two that look alike (the larger picture where sharpness is no score)."""
    rows = curated[curated.keep]
    rank = rows["sharpness"] if "sharpness" in rows else rows["width"] * rows["height"]
    found = duplicates(rows["hash"].tolist(), rank.to_numpy(dtype=np.float64), bits)
    pairs = {rows.index[a]: rows.index[b] for a, b in found.items()}
    reasons = pd.Series({a: _alike(rows.loc[a], rows.loc[b]) for a, b in pairs.items()}, dtype="str")
    for a, b in pairs.items():
        curated.loc[a, "duplicate_of"] = rows.loc[b, "clip_id"]
    funnel.append(_drop(curated, "duplicate", f"differs in more than {bits} of 64 bits", reasons))


def _alike(row: "pd.Series[Any]", kept: "pd.Series[Any]") -> str:
    if row["sha256"] == kept["sha256"]:
        return f"same bytes as {kept['clip_id']}"
    return f"near-duplicate of {kept['clip_id']} ({distance(row['hash'], kept['hash'])} of 64 bits differ)"


def _advice(scored: pd.DataFrame, keep: Keep, funnel: list[Drop]) -> str:
    """Which threshold, on its own, drops most, and where it would have to be to keep half of the clips."""
    worst, count, end = "", -1, "min"
    for name, limits in keep.thresholds.items():
        for bound, outside in (
            ("min", scored[name] < _number(limits.min)),
            ("max", scored[name] > _number(limits.max)),
        ):
            if int(outside.sum()) > count:
                worst, count, end = name, int(outside.sum()), bound
    steps = ", ".join(f"{step.name} {step.dropped}" for step in funnel if step.dropped)
    if count <= 0:
        return f"no clip is left (dropped by {steps})"
    half = float(scored[worst].median())
    return (
        f"no clip is left (dropped by {steps}). curation.keep.thresholds.{worst}.{end}="
        f"{getattr(keep.thresholds[worst], end):g} alone drops {count} of {len(scored)}; "
        f"{half:.4g} would keep half of them"
    )


def _number(value: float | None) -> float:
    """A bound as a number; an open end compares false with everything."""
    return float("nan") if value is None else value
