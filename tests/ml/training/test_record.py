import resource
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import RunLog
from ml.training.curves import read_log
from ml.training.record import Record


class Kept(RunLog):
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told, self.beats = dict[int, dict[str, float]](), 0

    def metrics(self, values: Any, step: int = 0) -> None:
        self.told[step] = dict(values)

    def heartbeat(self) -> None:
        self.beats += 1


def row(step: int) -> dict[str, Any]:
    numbers = {name: 1.0 for name in ("lr", "grad_norm", "examples_per_second", "tokens_per_second", "data_wait_share")}
    return {
        "step": step,
        "loss": step / 4,
        "seconds": 1.5,
        "examples": 2,
        "tokens": 8,
        "bucket": "b",
        "mfu": 0.25,
        **numbers,
    }


def test_steps_become_rows_and_curves_and_a_rollback_takes_them_out(tmp_path: Path) -> None:
    log = Kept()
    record = Record(tmp_path / "loss.csv", "stage1", 4, log)
    assert record.last() == 0
    with record.opened(0):
        for step in (1, 2, 3):
            record.add(row(step), {"kl": 0.5})
        record.cut(1)
        record.add(row(2), {})
    assert read_log(tmp_path / "loss.csv")["loss"].tolist() == [0.25, 0.5]
    assert Record(tmp_path / "loss.csv", "stage1", 4, None).last() == 2
    assert log.beats == 4
    assert log.told[3] == {
        **{name: 1.0 for name in ("lr", "grad_norm", "examples_per_second", "tokens_per_second", "data_wait_share")},
        **{"loss": 0.75, "mfu": 0.25, "loss_kl": 0.5},
    }


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = Record(tmp_path / "loss.csv", "stage1", 4, None)
    with record.opened(0):
        record.add(row(1), {})
        record.cut(0)
        record.say("hello")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file may not grow: the kernel's own error, as when a disk is full (it is raised where SIGXFSZ is ignored)."""
    record = Record(tmp_path / "loss.csv", "stage1", 4, Kept())
    with record.opened(0):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
        try:
            record.add(row(1), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "loss.csv was not written: [Errno 27]" in caplog.text
