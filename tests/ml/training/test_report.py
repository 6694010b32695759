import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from ml.recipe import Recipe
from ml.training import report
from ml.training.curves import COLUMNS, LossLog


class Trained:
    """What a report asks of a trainer: a plan, an engine, a stream."""

    def __init__(self, out: Path) -> None:
        from ml.training.checkpoint import Identity

        self.plan = type("Plan", (), {"out": out, "identity": Identity("v2_0-tiny", "stage1", "a")})
        masters = {"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}
        self.engine = type("Engine", (), {"device": torch.device("cpu"), "masters": staticmethod(lambda: masters)})


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
    assert found["num_parameters"] == 18.0


def test_memory_is_the_peak_of_the_process_in_mib() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert report.peak_memory_mb(torch.device("cpu")) == pytest.approx(peak / 2**20, rel=0.01)


def test_the_picture_is_drawn_beside_the_weights(trained: Any) -> None:
    assert (trained.plan.out / report.draw(trained)).stat().st_size > 5000


def test_a_stage_becomes_flat_parameters(tiny_recipe: Recipe) -> None:
    found = report.params(tiny_recipe.stages[0], "stage.")
    assert found["stage.optimizer.lr"] == tiny_recipe.stages[0].optimizer.lr
    assert found["stage.engine.precision"] == "fp32"
    assert not any(isinstance(value, BaseModel) for name, value in found.items() if "buckets" not in name)
