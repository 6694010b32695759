"""Pictures that a person looks at: sheets of frames with labels, and curves."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.uint8]
GAP_PX, GROUP_GAP_PX, LABEL_PX, FONT_PX = 6, 12, 18, 13
BACKGROUND, INK = (250, 250, 250), (30, 30, 30)


@dataclass(frozen=True)
class Strip:
    """One row of a sheet: a label above groups of frames, each group [T,H,W,3] uint8."""

    label: str
    groups: Sequence[Frames]


def sheet(strips: Sequence[Strip], path: Path, height_px: int = 96, title: str = "") -> Path:
    """Rows of frames under their labels, every frame scaled to one height; written as a PNG, the path returned."""
    font = ImageFont.load_default(FONT_PX)
    rows = [[_row(group, height_px) for group in strip.groups] for strip in strips]
    width = GAP_PX + max(sum(image.width + GROUP_GAP_PX for image in row) for row in rows)
    labels = [textwrap.wrap(strip.label, max(20, width * 2 // FONT_PX)) or [""] for strip in strips]
    top = LABEL_PX + 2 * GAP_PX if title else GAP_PX
    height = top + sum(LABEL_PX * len(lines) + height_px + 2 * GAP_PX for lines in labels)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP_PX, GAP_PX), title, INK, font)
    for lines, row in zip(labels, rows, strict=True):
        for line in lines:
            draw.text((GAP_PX, top), line, INK, font)
            top += LABEL_PX
        left = GAP_PX
        for image in row:
            canvas.paste(image, (left, top))
            left += image.width + GROUP_GAP_PX
        top += height_px + 2 * GAP_PX
    canvas.save(path)
    return path


def spread(clip: Frames, count: int) -> Frames:
    """`count` frames of a clip [T,H,W,3], evenly spread from the first to the last; all of a shorter clip."""
    picked: Frames = clip[np.unique(np.linspace(0, len(clip) - 1, count).round().astype(int))]
    return picked


def curves(lines: Mapping[str, Sequence[float]], at: Sequence[float], labels: tuple[str, str, str], path: Path) -> Path:
    """One line for each name over the same points, `labels` = (title, x, y); written as a PNG, the path returned."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, values in lines.items():
        axes.plot(at, values, marker="o", markersize=4, label=f"{name} (mean {np.mean(values):.3f})")
    axes.set(title=labels[0], xlabel=labels[1], ylabel=labels[2], ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _row(frames: Frames, height_px: int) -> Image.Image:
    """The frames of a group side by side, close together."""
    width = round(frames.shape[2] * height_px / frames.shape[1])
    canvas = Image.new("RGB", (len(frames) * (width + 1) - 1, height_px), BACKGROUND)
    for index, frame in enumerate(frames):
        scaled = Image.fromarray(frame).resize((width, height_px), Image.Resampling.LANCZOS)
        canvas.paste(scaled, (index * (width + 1), 0))
    return canvas
