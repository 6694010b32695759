from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ml.recipe import Recipe
from ml.training import report
from ml.training.curves import COLUMNS, LossLog
from ml.training.meter import Meter


class Trained:
    """What the numbers of a report ask of a trainer: a plan and a meter."""

    def __init__(self, out: Path) -> None:
        from ml.training.checkpoint import Identity

        self.plan = type("Plan", (), {"out": out, "identity": Identity("v2_0-tiny", "stage1", "a")})
        self.aids = type("Aids", (), {"meter": Meter(1e9, 1)})


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """Ten steps of 2 seconds, 4 examples and 60 tokens; a quarter of every second step was waiting for data."""
    log = LossLog(tmp_path / "loss.csv", 0)
    for step in range(1, 11):
        numbers = {"step": step, "loss": 11 - step, "seconds": 2.0, "examples": 4, "tokens": 60}
        log.add({**dict.fromkeys(COLUMNS, 1), **numbers, "data_wait_share": 0.25 * (step % 2), "bucket": "a"})
    log.close()
    return Trained(tmp_path)


def test_rates_are_totals_over_seconds(trained: Any) -> None:
    found = report.numbers(trained)
    assert (found["loss_first"], found["loss_last"], found["steps"]) == (10.0, 1.0, 10.0)
    assert (found["examples"], found["tokens"]) == (40.0, 600.0)
    assert (found["examples_per_second"], found["tokens_per_second"]) == (2.0, 30.0)
    assert found["data_wait_share"] == pytest.approx(0.125)
    assert found["mfu"] == 1.0
    assert found["seconds_useful"] == 0.0


def test_the_picture_is_drawn_beside_the_weights(trained: Any) -> None:
    assert (trained.plan.out / report.draw(trained)).stat().st_size > 5000


def test_a_stage_becomes_flat_parameters(tiny_recipe: Recipe) -> None:
    found = report.params(tiny_recipe.stages[0], "stage.")
    assert found["stage.optimizer.lr"] == tiny_recipe.stages[0].optimizer.lr
    assert found["stage.engine.precision"] == "fp32"
    assert not any(isinstance(value, BaseModel) for name, value in found.items() if "buckets" not in name)
