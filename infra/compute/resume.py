"""Who starts a training again: which endings are worth another attempt, after which pause, and the run above them all.

Attempts of a step that may be resumed are children of one parent run in MLflow. The parent costs nothing and has no
price row, so that the ledger, which bills the attempts, never sees it; it is closed with what they add up to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from infra.compute.task import HUNG, PREEMPTED, RANK_LOST, Task, TaskFailed, TaskState
from infra.runs import SECONDS_USEFUL, Bill, RunRecord, Status, Tag, Total
from infra.tracking import Tracker

LONGEST_PAUSE_SECONDS = 300.0
# Tags of an attempt that say what it costs.
_PRICED = (Tag.ACCELERATORS, Tag.DEVICES, Tag.NODES, Tag.PRICE_ROW, Tag.USD_PER_HOUR, Tag.PURPOSE)


class Parent:
    """The run that stands above all attempts at one step with one set of inputs; made when the first is launched."""

    def __init__(self, tracker: Tracker, task: Task) -> None:
        self._tracker, self._task = tracker, task
        self._used = False

    def open(self) -> str:
        """Its id; it is opened, or opened again, when it is not open yet."""
        found, self._used = self._found(), True
        if found is None:
            tags = {str(key): value for key, value in self._task.tags.items() if key not in _PRICED}
            about: dict[str, str] = {Tag.STEP: self._task.name, Tag.PARENT_OF: self._task.key}
            return self._tracker.open(self._task.experiment, self._task.name, {**tags, **about})
        if found.status != Status.RUNNING:
            self._tracker.reopen(found.run_id)
        return found.run_id

    def close(self, status: Status) -> None:
        """Close it with what its attempts add up to; left alone while one of them runs, and where nothing happened."""
        found = self._found()
        if found is not None and (self._used or found.status == Status.RUNNING):
            _close(self._tracker, found, status)

    def _found(self) -> RunRecord | None:
        records = self._tracker.runs(self._task.experiment, f"tags.{Tag.PARENT_OF} = '{self._task.key}'")
        return next((record for record in records if record.name == self._task.name), None)


@contextmanager
def parent_run(tracker: Tracker, task: Task) -> Iterator[Parent]:
    """The parent of a task's attempts, closed by how the block ends."""
    parent = Parent(tracker, task)
    status = Status.KILLED
    try:
        yield parent
        status = Status.FINISHED
    except Exception:
        status = Status.FAILED
        raise
    finally:
        parent.close(status)


def settle_parents(tracker: Tracker) -> None:
    """Close the parents that an orchestrator left open and whose attempts have all ended, as the last of these did."""
    for record in tracker.runs(None, f"attributes.status = '{Status.RUNNING}'"):
        if Tag.PARENT_OF in record.tags:
            attempts = _attempts(tracker, record)
            _close(tracker, record, Status(attempts[0].status) if attempts else Status.KILLED)


def worth_another(failure: TaskFailed) -> bool:
    """Whether the same task may well succeed if it is started again.

    So it is after a preemption, a lost machine, a signal (a node's memory watch, a crash of a driver) or a hang; an
    error in words, or a device without memory, would come again.
    """
    state = failure.state or TaskState("failed")
    code = state.exit_code
    return state.status in ("preempted", "lost") or (
        code is not None and (code < 0 or code in (PREEMPTED, HUNG, RANK_LOST))
    )


def pauses(first_seconds: float, count: int) -> list[float]:
    """Seconds to wait before each further attempt: twice as long every time, five minutes at most."""
    return [min(first_seconds * 2**number, LONGEST_PAUSE_SECONDS) for number in range(count)]


def totals(attempts: Sequence[RunRecord]) -> dict[str, float]:
    """What attempts add up to; goodput is useful over billed seconds, and an attempt that told of none had none."""
    seconds = sum(_metric(record, Bill.WALL_SECONDS) for record in attempts)
    found: dict[str, float] = {
        Total.ATTEMPTS: len(attempts),
        Total.COST_USD: sum(_metric(record, Bill.COST_USD) for record in attempts),
        Total.WALL_SECONDS: seconds,
    }
    if seconds and any(SECONDS_USEFUL in record.metrics for record in attempts):
        found[Total.GOODPUT] = sum(_metric(record, SECONDS_USEFUL) for record in attempts) / seconds
    return found


def _close(tracker: Tracker, parent: RunRecord, status: Status) -> None:
    attempts = _attempts(tracker, parent)
    if all(record.status != Status.RUNNING for record in attempts):
        tracker.close(parent.run_id, status, totals(attempts))


def _attempts(tracker: Tracker, parent: RunRecord) -> list[RunRecord]:
    return tracker.runs(parent.experiment, f"tags.{Tag.PARENT} = '{parent.run_id}'")


def _metric(record: RunRecord, name: str) -> float:
    return record.metrics.get(name, 0.0)
