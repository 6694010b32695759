"""The record of a training run, one row a step, and its picture."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd

COLUMNS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "examples_per_second",
    "tokens_per_second",
    "data_wait_share",
    "mfu",
    "seconds",
    "examples",
    "tokens",
    "bucket",
)


class LossLog:
    """`loss.csv`: appended and flushed every step; rows after `step` (of an attempt that was killed) are taken out."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = read_log(path)
        kept = kept[kept["step"] <= step]
        partial = path.with_suffix(".partial")
        kept.to_csv(partial, index=False)
        partial.replace(path)
        self._stream: TextIO = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._stream, COLUMNS, extrasaction="ignore")

    def add(self, row: Mapping[str, object]) -> None:
        """Append one step; floats keep all their digits, so that a resumed run can be compared with a straight one."""
        self._writer.writerow(row)
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_log(path: Path) -> pd.DataFrame:
    """The rows of a `loss.csv`, or none; a last row that was cut off by a kill is left out."""
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype="float64") for name in COLUMNS})
    with path.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
    whole = text[: text.rfind("\n") + 1]
    rows = [row for row in csv.DictReader(whole.splitlines()) if None not in row.values()]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = [name for name in COLUMNS if name != "bucket"]
    frame[numbers] = frame[numbers].astype("float64")
    return frame.astype({"step": "int64", "examples": "int64", "tokens": "int64"})


def edge_losses(frame: pd.DataFrame) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of the steps, 20 steps at most: single steps are too noisy.

    Steps whose loss was not finite are left out, here and in the picture.
    """
    frame = frame.dropna(subset=["loss"])
    number = max(1, min(20, len(frame) // 10))
    return float(frame["loss"].head(number).mean()), float(frame["loss"].tail(number).mean())


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred mean over a window of `share` of the points; the window shrinks at both ends."""
    half = max(1, int(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low, high = np.maximum(0, centre - half), np.minimum(len(values), centre + half + 1)
    smoothed: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smoothed


def plot_losses(frame: pd.DataFrame, title: str, path: Path) -> Path:
    """Loss per step, raw and smoothed, above learning rate and gradient norm; written as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    frame = frame.dropna(subset=["loss", "grad_norm"])
    steps, loss = frame["step"].to_numpy(), frame["loss"].to_numpy()
    top.plot(steps, loss, ".", color="0.7", markersize=3, label="each step")
    top.plot(steps, smooth(loss), color="tab:blue", linewidth=2, label="smoothed")
    spread = np.nanpercentile(loss, [0, 98])
    margin = 0.05 * (spread[1] - spread[0]) + 1e-6
    top.set(title=title, ylabel="loss", ylim=(spread[0] - margin, spread[1] + 2 * margin))
    top.legend(frameon=False)
    bottom.plot(steps, frame["grad_norm"], color="tab:orange", linewidth=1)
    bottom.set(xlabel="step", ylabel="gradient norm", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
