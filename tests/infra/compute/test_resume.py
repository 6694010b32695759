"""Starting again by itself: real tasks that fail as they are told, a real MLflow store, and a bill that adds up."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from infra.compute.attempt import Attempts
from infra.compute.local import LocalLauncher
from infra.compute.resume import pauses, settle_parents, totals, worth_another
from infra.compute.task import HUNG, OUT_OF_MEMORY, RANK_LOST, Handle, Task, TaskFailed, TaskState
from infra.ledger import Ledger, frame_of, headline
from infra.runs import RunRecord, Status, Tag
from infra.tracking import Tracker

MakeTask = Callable[..., Task]
# Fails in each of these ways in turn, then finishes: the toy task starts with a line in `starts`.
FLAKY = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
ways = sys.argv[sys.argv.index("--ways") + 1].split()
with (out / "starts").open("a") as stream:
    stream.write("start\\n")
way = ([*ways, "finish"])[len((out / "starts").read_text().split()) - 1]
time.sleep(0.1)
if way == "finish":
    (out / "result.json").write_text("{}")
elif way == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif way == "lose":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
elif way == "wait":
    print("working", flush=True)
    time.sleep(60)
else:
    sys.exit(int(way))
"""


@pytest.fixture
def flaky(make_task: MakeTask) -> Callable[..., Task]:
    """Factory `flaky("75", "kill", retries=3)` of tasks that end so in turn and then finish."""

    def make(*ways: str, retries: int = 3) -> Task:
        task = make_task(key="f" * 16)
        (task.out.parents[2] / "flaky_task.py").write_text(FLAKY, encoding="utf-8")
        arguments = ("--out", str(task.out), "--ways", " ".join(ways))
        return replace(task, module="flaky_task", arguments=arguments, purpose="headline", retries=retries)

    return make


def attempts_of(tracker: Tracker, lines: list[str] | None = None) -> Attempts:
    """Attempts that do not wait long."""
    say = (lambda line: None) if lines is None else lines.append
    return Attempts(LocalLauncher(grace_seconds=1.0), tracker, say, pause_seconds=0.05)


def family(tracker: Tracker) -> tuple[RunRecord, list[RunRecord]]:
    """The one parent, and its attempts, oldest first."""
    records = tracker.runs()
    [parent] = [record for record in records if Tag.PARENT_OF in record.tags]
    children = [record for record in records[::-1] if record is not parent]
    assert {child.tags[Tag.PARENT] for child in children} == {parent.run_id}
    return parent, children


def test_what_may_not_come_again_is_tried_again_and_the_bill_adds_up(
    tracker: Tracker, flaky: Callable[..., Task]
) -> None:
    lines = list[str]()
    outcome = attempts_of(tracker, lines).run(flaky("75", "kill", str(HUNG)))
    parent, children = family(tracker)
    assert [child.status for child in children] == ["KILLED", "FAILED", "FAILED", "FINISHED"]
    assert [child.tags[Tag.PURPOSE] for child in children] == ["preempted", "failed", "failed", "headline"]
    assert [child.tags[Tag.ATTEMPT] for child in children] == ["1", "2", "3", "4"]
    assert outcome.run_id == children[-1].run_id
    assert next(line for line in lines if "starting it again" in line).startswith("toy-tiny/shots/live was preempted")
    assert "(3 of 3)" in lines[-1]

    paid = sum(child.metrics["cost_usd"] for child in children)
    assert parent.status == Status.FINISHED
    assert parent.metrics == {
        "total_attempts": 4,
        "total_cost_usd": pytest.approx(paid),
        "total_wall_seconds": pytest.approx(sum(child.metrics["wall_seconds"] for child in children)),
    }
    rows = Ledger(tracker).rows()
    assert list(rows["run_id"]) == [child.run_id for child in children], "the parent is on no bill"
    assert rows["cost_usd"].sum() == pytest.approx(paid)
    assert list(headline(rows)["run_id"]) == [outcome.run_id]


def test_mlflow_shows_attempts_below_their_parent(tracker: Tracker, flaky: Callable[..., Task]) -> None:
    attempts_of(tracker).run(flaky())
    parent, [child] = family(tracker)
    below = tracker.runs(filter=f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert [record.run_id for record in below] == [child.run_id]


def test_without_retries_every_attempt_is_still_a_run_under_the_parent(
    tracker: Tracker, flaky: Callable[..., Task]
) -> None:
    task = flaky("75", retries=0)
    with pytest.raises(TaskFailed, match="was preempted"):
        attempts_of(tracker).run(task)
    assert (family(tracker)[0].status, len(family(tracker)[1])) == ("FAILED", 1)
    attempts_of(tracker).run(task)
    parent, children = family(tracker)
    assert (parent.status, [child.status for child in children]) == ("FINISHED", ["KILLED", "FINISHED"])
    assert list(Ledger(tracker).rows()["run_id"]) == [child.run_id for child in children]


@pytest.mark.parametrize("code", ["1", str(OUT_OF_MEMORY)])
def test_what_would_come_again_is_not_tried_again(tracker: Tracker, flaky: Callable[..., Task], code: str) -> None:
    with pytest.raises(TaskFailed):
        attempts_of(tracker).run(flaky(code))
    parent, [child] = family(tracker)
    assert (parent.status, child.status, parent.metrics["total_attempts"]) == ("FAILED", "FAILED", 1)


def test_there_is_an_end_to_it_and_a_person_may_go_on(tracker: Tracker, flaky: Callable[..., Task]) -> None:
    task = flaky("75", "75", "75", retries=1)
    with pytest.raises(TaskFailed, match="was preempted"):
        attempts_of(tracker).run(task)
    parent, children = family(tracker)
    assert (parent.status, len(children)) == ("FAILED", 2)
    attempts_of(tracker).run(task)
    again, children = family(tracker)
    assert (again.run_id, again.status, again.metrics["total_attempts"]) == (parent.run_id, "FINISHED", 4)
    assert attempts_of(tracker).run(task).reused
    assert len(tracker.runs()) == 5, "a finished step opens no run"


def test_a_lost_supervisor_is_survived(tracker: Tracker, flaky: Callable[..., Task]) -> None:
    attempts_of(tracker).run(flaky("lose"))
    parent, children = family(tracker)
    assert [child.status for child in children] == ["KILLED", "FINISHED"]
    assert parent.metrics["total_attempts"] == 2


def test_an_interrupt_is_no_reason_to_start_again(tracker: Tracker, flaky: Callable[..., Task]) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(attempts_of(tracker), say=interrupt).run(flaky("wait"))
    parent, [child] = family(tracker)
    assert (parent.status, child.status) == ("KILLED", "KILLED")
    assert parent.metrics["total_cost_usd"] == child.metrics["cost_usd"] > 0


def test_a_parent_whose_orchestrator_never_came_back_is_closed_once_nothing_runs(
    tracker: Tracker, flaky: Callable[..., Task]
) -> None:
    def crash(line: str) -> None:
        raise OSError("no space left")

    task = flaky("wait")
    with pytest.raises(OSError, match="no space"):
        replace(attempts_of(tracker), say=crash).run(task)
    settle_parents(tracker)
    parent, [child] = family(tracker)
    assert (parent.status, child.status) == ("RUNNING", "RUNNING"), "the task goes on"
    os.kill(Handle.from_json(child.tags[Tag.HANDLE]).data["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not attempts_of(tracker).settle():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent, [child] = family(tracker)
    assert (parent.status, child.status, parent.metrics["total_attempts"]) == ("KILLED", "KILLED", 1)


def test_which_endings_are_worth_another_attempt() -> None:
    def again(status: str, code: int | None = None) -> bool:
        return worth_another(TaskFailed("", TaskState(status, exit_code=code)))  # type: ignore[arg-type]

    assert [again("preempted"), again("lost"), again("failed", -9), again("failed", -6)] == [True] * 4
    assert [again("failed", HUNG), again("failed", RANK_LOST)] == [True] * 2
    assert [again("failed"), again("failed", 1), again("failed", OUT_OF_MEMORY), again("succeeded", 0)] == [False] * 4


def test_pauses_double_up_to_five_minutes() -> None:
    assert pauses(5.0, 8) == [5, 10, 20, 40, 80, 160, 300, 300]
    assert pauses(5.0, 0) == []


def test_goodput_is_useful_seconds_over_billed_ones_and_silence_counts_as_waste() -> None:
    def attempt(seconds: float, **more: float) -> RunRecord:
        now = datetime.now(UTC)
        metrics = {"wall_seconds": seconds, "cost_usd": 0.0, **more}
        return RunRecord("r", "e", "n", "FINISHED", now, now, metrics, {}, {})

    assert totals([attempt(100, seconds_useful=80), attempt(300, seconds_useful=120)])[
        "total_goodput"
    ] == pytest.approx(0.5)
    assert totals([attempt(100, seconds_useful=80), attempt(100)])["total_goodput"] == pytest.approx(0.4)
    assert "total_goodput" not in totals([attempt(100)])
    assert frame_of([attempt(100)], datetime.now(UTC)).empty
