from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml.training.curves import COLUMNS, LossLog, edge_losses, plot_losses, read_log, smooth


def row(step: int, loss: float) -> dict[str, object]:
    return {**dict.fromkeys(COLUMNS, 1), "step": step, "loss": loss, "bucket": "64px/48x80/5"}


def written(path: Path, steps: int) -> Path:
    log = LossLog(path, 0)
    for step in range(1, steps + 1):
        log.add(row(step, 1 / 3 + 1 / step))
    log.close()
    return path


def test_every_digit_of_a_loss_survives(tmp_path: Path) -> None:
    rows = read_log(written(tmp_path / "loss.csv", 5))
    assert rows["loss"].tolist() == [1 / 3 + 1 / step for step in range(1, 6)]
    assert rows["step"].tolist() == [1, 2, 3, 4, 5]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = written(tmp_path / "loss.csv", 5)
    with path.open("a") as stream:
        stream.write("6,0.12")
    log = LossLog(path, 3)
    log.add(row(4, 0.25))
    log.close()
    rows = read_log(path)
    assert rows["step"].tolist() == [1, 2, 3, 4]
    assert rows["loss"].tolist() == [4 / 3, 1 / 3 + 1 / 2, 2 / 3, 0.25]


def test_no_log_is_no_rows(tmp_path: Path) -> None:
    assert read_log(tmp_path / "loss.csv").empty


def test_the_ends_of_a_run_are_means_over_a_tenth(tmp_path: Path) -> None:
    rows = read_log(written(tmp_path / "loss.csv", 40))
    first, last = edge_losses(rows)
    assert first == pytest.approx(rows["loss"].iloc[:4].mean())
    assert last == pytest.approx(rows["loss"].iloc[-4:].mean())


def test_smoothing_keeps_lines_and_evens_out_noise() -> None:
    line = np.linspace(3, 1, 101)
    assert smooth(line)[10:-10] == pytest.approx(line[10:-10])
    noisy = line + np.random.default_rng(0).normal(0, 0.5, 101)
    assert np.abs(smooth(noisy, 0.2) - line).mean() < 0.3 * np.abs(noisy - line).mean()


def test_the_picture_shows_something(tmp_path: Path) -> None:
    path = plot_losses(read_log(written(tmp_path / "loss.csv", 50)), "v2_0-tiny stage1", tmp_path / "loss.png")
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape[0] > 400
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
