"""The meter against sums made by hand, and a real training of it: every second is somewhere."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from ml.training.meter import Meter, peak_memory_mb
from ml.training.step import StepReport


def report(flops: float = 0.0, updated: bool = True) -> StepReport:
    return StepReport(loss=1.0, grad_norm=1.0, examples=8, tokens=800, flops=flops, updated=updated)


def test_rates_and_utilisation_of_a_step() -> None:
    numbers = Meter(1e12, ranks=4, started=time.time()).step(report(flops=2e12), seconds=2.0, waited=0.5)
    assert numbers["examples_per_second"] == 4.0
    assert numbers["tokens_per_second"] == 400.0
    assert numbers["data_wait_share"] == 0.25
    assert numbers["mfu"] == 2e12 / (2.0 * 4e12)
    assert numbers["peak_memory_mb"] == peak_memory_mb()


def grown(mib: int) -> tuple[float, float]:
    """Peaks that two steps tell of, with so many MiB held for a while between them."""
    meter = Meter(1e12, 1)
    before = meter.step(report(), seconds=1.0, waited=0.0)["peak_memory_mb"]
    torch.ones(mib, 2**18)
    return before, meter.step(report(), seconds=1.0, waited=0.0)["peak_memory_mb"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and its memory is what counts")
def test_the_peak_is_of_what_was_held_once(ranks: Callable[..., list[Any]]) -> None:
    [(before, after)] = ranks(grown, 200, count=1)
    # What was freed before is held again first, and the allocator rounds up: never less, and not half as much again.
    assert 199 <= after - before <= 300


def test_goodput_counts_what_was_computed_and_kept() -> None:
    meter = Meter(1e12, 1, started=time.time() - 100.0)
    told = [meter.step(report(), seconds=10.0, waited=1.0)["seconds_useful"] for _ in range(4)]
    assert told == [9.0, 18.0, 27.0, 36.0]
    meter.step(report(updated=False), seconds=10.0, waited=0.0)
    assert meter.goodput() == pytest.approx(36 / 100, rel=1e-2)
    meter.thrown_away(2)  # the skipped one and the fourth
    assert meter.goodput() == pytest.approx(27 / 100, rel=1e-2)
    totals = meter.totals()
    assert totals["seconds_data"] == 4.0
    assert totals["seconds_skipped"] == 10.0
    assert totals["seconds_thrown_away"] == 9.0
    assert totals["seconds_useful"] == 27.0


def test_steps_that_an_earlier_attempt_made_are_not_useful_again() -> None:
    meter = Meter(1e12, 1, started=time.time() - 50.0)
    meter.redo(2)
    for _ in range(3):
        meter.step(report(), seconds=5.0, waited=0.0)
    assert meter.totals()["seconds_redone"] == 10.0
    assert meter.totals()["seconds_useful"] == 5.0


def test_more_steps_are_taken_back_than_were_made() -> None:
    meter = Meter(1e12, 1, started=time.time() - 10.0)
    meter.step(report(), seconds=5.0, waited=0.0)
    meter.thrown_away(7)
    assert meter.goodput() == 0.0


def test_lost_seconds_count_whatever_ends_them() -> None:
    meter = Meter(1e12, 1)
    with suppress(OSError), meter.lost("checkpoint"):
        time.sleep(0.02)
        raise OSError("full")
    assert 0.02 <= meter.totals()["seconds_checkpoint"] < 1.0


def test_every_second_is_somewhere() -> None:
    meter = Meter(1e12, 1, started=time.time() - 30.0)
    meter.step(report(), seconds=10.0, waited=2.0)
    with meter.lost("validation"):
        time.sleep(0.01)
    meter.redo(1)
    meter.step(report(), seconds=5.0, waited=0.0)
    totals = meter.totals()
    parts = [seconds for name, seconds in totals.items() if name.startswith("seconds_") and name != "seconds_attempt"]
    assert sum(parts) == pytest.approx(totals["seconds_attempt"], abs=1e-6)


def test_an_attempt_starts_with_its_process() -> None:
    meter = Meter(1e12, 1)
    assert 0.0 < time.time() - meter.started < 24 * 3600
    assert meter.goodput() == 0.0
    assert meter.totals()["mfu"] == 0.0
