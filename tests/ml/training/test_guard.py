import math

import pytest

from ml.methods import Guard as Section
from ml.training.guard import Guard, TrainingDiverged


def test_a_step_that_is_not_finite_is_passed_over_and_a_row_of_them_is_undone() -> None:
    guard = Guard(Section(patience=3))
    steps = [
        (1.0, 1.0),
        (math.nan, 1.0),
        (1.0, math.inf),
        (1.0, 1.0),
        (math.nan, 1.0),
        (math.inf, 1.0),
        (1.0, math.nan),
    ]
    assert [guard.judge(*step) for step in steps] == ["good", "bad", "bad", "good", "bad", "bad", "rollback"]
    guard.rolled_back("step 7")
    assert guard.judge(math.nan, 1.0) == "bad", "the count starts anew after a rollback"


def test_a_spike_stands_out_of_the_median_of_a_full_window() -> None:
    guard = Guard(Section(spike=3.0, window=5))
    assert guard.judge(100.0, 1.0) == "good", "nothing to compare with yet"
    assert [guard.judge(loss, 1.0) for loss in (1.0, 2.0, 2.0, 3.0)] == ["good"] * 4
    assert guard.judge(6.0, 1.0) == "good", "three times the median of 100, 1, 2, 2, 3"
    assert guard.judge(6.1, 1.0) == "rollback"
    assert guard.judge(6.1, 1.0) == "rollback", "a spike does not enter the window"


def test_without_a_spike_factor_no_finite_loss_is_bad() -> None:
    guard = Guard(Section(window=1))
    assert [guard.judge(loss, 1.0) for loss in (1.0, 1e9, 1e-9)] == ["good"] * 3


def test_too_many_ways_back_end_the_training() -> None:
    guard = Guard(Section(rollbacks=2))
    guard.rolled_back("step 3")
    guard.rolled_back("step 5")
    with pytest.raises(
        TrainingDiverged, match=r"step 7, on examples clip1: this is wrong turn 3, and guard\.rollbacks"
    ):
        guard.rolled_back("step 7, on examples clip1")
    with pytest.raises(TrainingDiverged):
        Guard(Section(rollbacks=0)).rolled_back("step 1")
