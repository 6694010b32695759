"""Pictures of a curation: the funnel, the scores with their thresholds, contact sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from infra.workspace import Workspace
from ml.curation.filters import Drop
from ml.curation.footage import FootageError, Pixels, middle_frame
from ml.sections import Range

SHEET_CLIPS, SHEET_COLUMNS = 24, 6
TILE_WIDTH_PX, TILE_HEIGHT_PX, LABEL_PX, GAP_PX = 240, 136, 34, 8
KEPT, DROPPED, INK, QUIET, PAPER = "#2f7f74", "#dd8452", "#22282e", "#6b747c", "#ffffff"
LABEL_INSIDE_SHARE = 0.08


def funnel_plot(funnel: Sequence[Drop], path: Path) -> None:
    """One bar a filter: clips that passed it, those it dropped beside them, with numbers and the rule in words."""
    passed = [funnel[0].before, *(step.after for step in funnel)]
    dropped = [0, *(step.dropped for step in funnel)]
    figure, (axes,) = _figure(1, 9.0, 1.0 + 0.46 * len(passed))
    rows = np.arange(len(passed))
    axes.barh(rows, passed, color=KEPT, height=0.64)
    axes.barh(rows, dropped, left=passed, color=DROPPED, height=0.64)
    _label_bars(axes, passed, dropped, ["", *(step.rule for step in funnel)])
    axes.set_yticks(rows, ["all clips", *(step.name.replace("_", " ") for step in funnel)])
    axes.invert_yaxis()
    axes.set_xlim(0, max(passed[0], 1) * 1.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    share = passed[-1] / max(passed[0], 1)
    axes.set_title(f"{passed[-1]:,} of {passed[0]:,} clips kept ({share:.0%})", loc="left", weight="bold", color=INK)
    _save(figure, path)


def score_plot(table: pd.DataFrame, names: Sequence[str], thresholds: Mapping[str, Range], path: Path) -> None:
    """A histogram for each score over the clips that were cut; what its thresholds leave out has another colour."""
    scored = table[table.status == "ok"]
    figure, panels = _figure(len(names), 3.1 * len(names), 2.7)
    for axes, name in zip(panels, names, strict=True):
        limits = thresholds[name] if name in thresholds else Range()
        _histogram(axes, scored[name].dropna().to_numpy(dtype=np.float64), limits)
        axes.set_title(name.replace("_", " "), loc="left", weight="bold", color=INK, size=10)
    panels[0].set_ylabel("clips", color=QUIET)
    _save(figure, path)


def contact_sheet(clips: pd.DataFrame, workspace: Workspace, path: Path) -> None:
    """Middle frames of at most 24 clips, spread evenly over the table, each with its id, span start and length."""
    chosen = clips.iloc[np.unique(np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).round().astype(int))]
    rows = max(1, -(-len(chosen) // SHEET_COLUMNS))
    cell_width, cell_height = TILE_WIDTH_PX + GAP_PX, TILE_HEIGHT_PX + LABEL_PX
    sheet = Image.new("RGB", (SHEET_COLUMNS * cell_width + GAP_PX, rows * cell_height + GAP_PX), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for place, clip in enumerate(chosen.to_dict("records")):
        x, y = GAP_PX + place % SHEET_COLUMNS * cell_width, GAP_PX + place // SHEET_COLUMNS * cell_height
        sheet.paste(Image.fromarray(_tile(clip, workspace)), (x, y))
        label = f"{clip['clip_id']}\nat {clip['start_seconds']:.1f} s, {clip['duration_seconds']:.1f} s long"
        draw.multiline_text((x, y + TILE_HEIGHT_PX + 2), label, fill=INK, font=font, spacing=1)
    if not len(chosen):
        draw.text((GAP_PX, GAP_PX), "no clips", fill=INK, font=font)
    partial = path.with_suffix(".partial")
    sheet.save(partial, format="PNG")
    partial.replace(path)


def _label_bars(axes: Any, passed: Sequence[int], dropped: Sequence[int], rules: Sequence[str]) -> None:
    total = max(passed[0], 1)
    for row, (left, gone, rule) in enumerate(zip(passed, dropped, rules, strict=True)):
        end: float = left + gone
        if left / total >= LABEL_INSIDE_SHARE:
            axes.text(left - 0.01 * total, row, f"{left:,}", ha="right", va="center", color=PAPER, weight="bold")
        else:
            axes.text(end + 0.015 * total, row, f"{left:,}", va="center", color=INK, weight="bold")
            end += 0.06 * total
        if gone:
            axes.text(end + 0.015 * total, row, f"-{gone:,}", va="center", color=DROPPED, weight="bold")
        axes.text(end + (0.09 if gone else 0.015) * total, row, rule, va="center", color=QUIET, size=9)


def _histogram(axes: Any, values: Any, limits: Range) -> None:
    """Thirty bins up to the 99th percentile (the last holds what lies above), thresholds as dashed lines.

    Scores that are positive and spread over decades get a logarithmic axis.
    """
    bounds = [bound for bound in (limits.min, limits.max) if bound is not None]
    low, high = _number(limits.min, -np.inf), _number(limits.max, np.inf)
    edges = _edges(values, bounds)
    shown = np.clip(values, edges[0], edges[-1])
    inside = (values >= low) & (values <= high)
    stacks = [np.histogram(shown[mask], edges)[0] for mask in (inside, ~inside)]
    for counts, bottom, colour in zip(stacks, (0, stacks[0]), (KEPT, DROPPED), strict=True):
        axes.bar(edges[:-1], counts, bottom=bottom, width=np.diff(edges) * 0.92, align="edge", color=colour)
    if edges[0] > 0:
        axes.set_xscale("log")
    axes.set_ylim(0, max(1, int((stacks[0] + stacks[1]).max())) * 1.2)
    for bound in (bound for bound in bounds if bound <= edges[-1]):
        axes.axvline(bound, color=INK, linestyle="--", linewidth=1)
        axes.annotate(f" {bound:g}", (bound, 0.92), xycoords=("data", "axes fraction"), color=INK, size=9)
    beyond = ", ".join(f"max {bound:g} →" for bound in bounds if bound > edges[-1])
    axes.annotate(beyond, (0.98, 0.92), xycoords="axes fraction", ha="right", color=INK, size=9)


def _edges(values: Any, bounds: Sequence[float]) -> Any:
    top = float(np.quantile(values, 0.99)) if len(values) else 1.0
    least = min([float(values.min()), *bounds]) if len(values) else 0.0
    if least > 0 and top > 8 * float(np.median(values)):
        return np.geomspace(least * 0.9, top * 1.02, 31)
    return np.linspace(min(0.0, least), max(top, 1e-9) * 1.02, 31)


def _number(bound: float | None, otherwise: float) -> float:
    return otherwise if bound is None else bound


def _tile(clip: Mapping[str, Any], workspace: Workspace) -> Pixels:
    """The clip's middle frame, fitted into a tile on a dark ground; a clip that cannot be read leaves the ground."""
    ground = np.full((TILE_HEIGHT_PX, TILE_WIDTH_PX, 3), 34, np.uint8)
    try:
        frame = middle_frame(workspace.resolve(clip["path"]), float(clip["duration_seconds"]))
    except FootageError:
        return ground
    scale = min(TILE_WIDTH_PX / frame.shape[1], TILE_HEIGHT_PX / frame.shape[0])
    width, height = max(1, int(frame.shape[1] * scale)), max(1, int(frame.shape[0] * scale))
    top, left = (TILE_HEIGHT_PX - height) // 2, (TILE_WIDTH_PX - width) // 2
    ground[top : top + height, left : left + width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    return ground


def _figure(panels: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of panels side by side without a display, and its axes without frames."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0, labelcolor=QUIET)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=130)
    partial.replace(path)
