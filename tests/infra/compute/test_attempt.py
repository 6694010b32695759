"""Attempts: real tasks, a real MLflow store, real kill -9."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from infra.compute.attempt import Attempts
from infra.compute.local import ROOT, LocalLauncher
from infra.compute.task import ComputeError, Handle, Task, TaskFailed, TaskState
from infra.runs import RunRecord, Status, Tag
from infra.tracking import Tracker
from infra.tracking_store import TrackingError

MakeTask = Callable[..., Task]


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """One MLflow store for the whole file: making one takes seconds. Tests differ in their step keys."""
    store = Tracker(f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db")
    store.check()
    return store


@dataclass(frozen=True)
class Counting:
    """The local launcher, counting launches; its tasks still run."""

    local: LocalLauncher = field(default_factory=lambda: LocalLauncher(grace_seconds=1.0))
    launched: list[str] = field(default_factory=list)
    name: str = "local"
    pause_seconds: float = 0.1

    def submit(self, task: Task, run_id: str, tracking_uri: str) -> Handle:
        """Count, and launch."""
        self.launched.append(run_id)
        return self.local.submit(task, run_id, tracking_uri)

    def find(self, task: Task, run_id: str, started: float) -> Handle | None:
        """As the local launcher does."""
        return self.local.find(task, run_id, started)

    def poll(self, handle: Handle) -> TaskState:
        """As the local launcher does."""
        return self.local.poll(handle)

    def cancel(self, handle: Handle) -> None:
        """As the local launcher does."""
        self.local.cancel(handle)

    def log_tail(self, handle: Handle) -> str:
        """As the local launcher does."""
        return self.local.log_tail(handle)


@pytest.fixture
def launcher() -> Counting:
    """A fresh count."""
    return Counting()


def runs_of(tracker: Tracker, task: Task) -> list[RunRecord]:
    """Runs of a task's step and inputs, oldest first."""
    return tracker.runs(task.experiment, f"tags.step_key = '{task.key}'")[::-1]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def test_success_is_recorded_billed_and_never_repeated(
    tracker: Tracker, launcher: Counting, make_task: MakeTask
) -> None:
    task, lines = make_task("say=one", "say=two", "finish", key="success"), list[str]()
    attempts = Attempts(launcher, tracker, lines.append)
    outcome = attempts.run(task)
    assert outcome.result["metrics"] == {"answer": 42.0}
    assert (outcome.reused, outcome.attached, outcome.state.exit_code) == (False, False, 0)
    assert lines == ["one", "two"]
    [run] = runs_of(tracker, task)
    assert (run.run_id, run.status, run.name) == (outcome.run_id, Status.FINISHED, task.name)
    assert run.tags[Tag.PURPOSE] == "data"
    assert run.tags["recipe"] == "toy"
    assert Handle.from_json(run.tags[Tag.HANDLE]).data["run_id"] == run.run_id
    seconds = run.metrics["wall_seconds"]
    assert 0 < seconds < 60
    assert run.metrics["cost_usd"] == pytest.approx(seconds / 3600 * 2 * 0.05) == pytest.approx(outcome.cost_usd)
    assert run.metrics["gpu_hours"] == 0, "cores are no accelerators"

    again = attempts.run(task)
    assert (again.reused, again.run_id, again.cost_usd) == (True, run.run_id, 0.0)
    assert again.result == outcome.result
    assert launcher.launched == [run.run_id]


def test_failure_says_why_is_billed_and_can_be_tried_again(
    tracker: Tracker, launcher: Counting, make_task: MakeTask
) -> None:
    task = make_task("say=reading", "raise=no column motion", key="failure")
    with pytest.raises(TaskFailed) as failure:
        Attempts(launcher, tracker).run(task)
    [run] = runs_of(tracker, task)
    message = str(failure.value)
    assert message.splitlines()[0] == f"{task.name} failed (exit code 1): ValueError: no column motion"
    assert "  | reading" in message
    assert f"run: {tracker.url(run.run_id)}" in message
    assert f"the whole log: {task.out / 'task.log'}" in message
    assert (run.status, run.tags[Tag.PURPOSE], run.tags[Tag.INTENDED_PURPOSE]) == ("FAILED", "failed", "data")
    assert run.metrics["cost_usd"] > 0

    mended = make_task("finish", key="failure")
    assert not Attempts(launcher, tracker).run(mended).reused
    assert [r.tags[Tag.ATTEMPT] for r in runs_of(tracker, task)] == ["1", "2"]
    assert [r.status for r in runs_of(tracker, task)] == ["FAILED", "FINISHED"]


def test_an_end_without_a_result_is_a_failure(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    task = make_task("say=done", key="noresult")
    with pytest.raises(TaskFailed, match=r"ended without error but wrote no result\.json"):
        Attempts(launcher, tracker).run(task)
    assert runs_of(tracker, task)[0].status == "FAILED"


def test_a_killed_child_is_a_failure_with_its_signal(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    def kill(line: str) -> None:
        [child] = psutil.Process(int(line)).children()
        child.kill()

    task = make_task("ppid", "await=never", key="killed")
    with pytest.raises(TaskFailed, match=r"was killed by SIGKILL \(out of memory\?\)"):
        Attempts(launcher, tracker, kill).run(task)
    assert runs_of(tracker, task)[0].tags[Tag.PURPOSE] == "failed"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "sqlite:////proc/nowhere/mlflow.db"])
def test_nothing_starts_without_tracking(launcher: Counting, make_task: MakeTask, uri: str) -> None:
    task = make_task("finish", key="untracked")
    with pytest.raises(TrackingError):
        Attempts(launcher, Tracker(uri)).run(task)
    assert launcher.launched == []
    assert not (task.out / "starts").exists()


def test_an_orchestrator_that_is_killed_loses_nothing(
    tracker: Tracker, launcher: Counting, make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task("say=working", "await=go", "finish", key="orphan")
    script = tmp_path / "orchestrator.py"
    script.write_text(
        "import sys, pathlib\n"
        "from infra.compute.attempt import Attempts\n"
        "from infra.compute.local import LocalLauncher\n"
        "from infra.compute.task import Resources, Task\n"
        "from infra.tracking import Tracker\n"
        "out, uri = sys.argv[1:]\n"
        "task = Task('toy-tiny/shots/live', 'toy_task', ('--out', out, '--do', 'say=working', 'await=go', 'finish'),\n"
        "    pathlib.Path(out), Resources('CPU:2', 1, 'cpu-assume-2026'), 'data', 'toy')\n"
        "Attempts(LocalLauncher(), Tracker(uri)).run(task)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}
    orchestrator = subprocess.Popen([sys.executable, str(script), str(task.out), tracker.uri], env=environment)
    try:
        wait_for(lambda: (task.out / "starts").is_file(), "the task's start")
        wait_for(lambda: Tag.HANDLE in runs_of(tracker, task)[0].tags, "the handle")
    finally:
        orchestrator.kill()
        orchestrator.wait()
    [run] = runs_of(tracker, task)
    handle = Handle.from_json(run.tags[Tag.HANDLE])
    assert run.status == Status.RUNNING
    assert launcher.poll(handle).running, "the task goes on"

    def say(line: str) -> None:
        if "waiting for run" in line:
            (task.out / "go").touch()

    outcome = Attempts(launcher, tracker, say).run(task)
    assert (outcome.attached, outcome.reused, outcome.run_id) == (True, False, run.run_id)
    assert launcher.launched == []
    assert (task.out / "starts").read_text().splitlines() == [run.run_id]
    [closed] = runs_of(tracker, task)
    assert closed.status == Status.FINISHED
    assert closed.metrics["wall_seconds"] >= 0.1


def submitted(tracker: Tracker, launcher: Counting, task: Task, handle: bool = True) -> tuple[str, Handle]:
    """A run as an orchestrator leaves it that dies right after launching."""
    tags: dict[str, str] = {
        Tag.STEP_KEY: task.key,
        Tag.PURPOSE: "data",
        Tag.DEVICES: "2",
        Tag.PRICE_ROW: "cpu-assume-2026",
    }
    run_id = tracker.open(task.experiment, task.name, {**tags, Tag.OUT: str(task.out)})
    held = launcher.local.submit(task, run_id, tracker.uri)
    if handle:
        tracker.tag(run_id, {Tag.HANDLE: held.to_json()})
    wait_for(lambda: (task.out / "starts").is_file(), "the task's start")
    return run_id, held


def test_a_result_that_came_meanwhile_is_used(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    task = make_task("finish", key="meanwhile")
    run_id, handle = submitted(tracker, launcher, task)
    wait_for(lambda: not launcher.poll(handle).running, "the end")
    outcome = Attempts(launcher, tracker).run(task)
    assert (outcome.run_id, outcome.attached, launcher.launched) == (run_id, True, [])
    assert outcome.cost_usd > 0
    assert runs_of(tracker, task)[0].status == Status.FINISHED


def test_a_launch_without_a_written_handle_is_found(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    task = make_task("sleep=0.5", "finish", key="nohandle")
    run_id, _ = submitted(tracker, launcher, task, handle=False)
    outcome = Attempts(launcher, tracker).run(task)
    assert (outcome.run_id, outcome.attached, launcher.launched) == (run_id, True, [])


def test_a_lost_attempt_is_billed_to_its_last_heartbeat_and_repeated(
    tracker: Tracker, launcher: Counting, make_task: MakeTask
) -> None:
    task = make_task("await=go", "finish", key="lost")
    run_id, handle = submitted(tracker, launcher, task)
    os.kill(handle.data["pid"], signal.SIGKILL)
    wait_for(lambda: not launcher.poll(handle).running, "the loss")
    beat = handle.data["started"] + 1800
    os.utime(task.out / "heartbeat", (beat, beat))  # as if it had worked for half an hour before it was lost
    (task.out / "go").touch()
    outcome = Attempts(launcher, tracker).run(task)
    lost, second = runs_of(tracker, task)
    assert (lost.run_id, lost.status, lost.tags[Tag.PURPOSE]) == (run_id, "KILLED", "failed")
    assert lost.tags[Tag.INTENDED_PURPOSE] == "data"
    assert lost.metrics["cost_usd"] == pytest.approx(0.5 * 2 * 0.05)
    assert (second.run_id, second.status, second.tags[Tag.ATTEMPT]) == (outcome.run_id, "FINISHED", "2")
    assert launcher.launched == [second.run_id]


def test_settling_closes_what_nobody_waited_for(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    ended, working = make_task("exit=2", key="ended"), make_task("await=go", "finish", key="working")
    run_id, handle = submitted(tracker, launcher, ended)
    other, _ = submitted(tracker, launcher, working)
    wait_for(lambda: not launcher.poll(handle).running, "the end")
    assert Attempts(launcher, tracker).settle() == [run_id]
    assert tracker.get(run_id).status == "FAILED"
    assert tracker.get(other).status == "RUNNING"
    (working.out / "go").touch()
    assert Attempts(launcher, tracker).run(working).attached


def test_an_interrupt_stops_the_task_and_closes_its_run(
    tracker: Tracker, launcher: Counting, make_task: MakeTask
) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    task = make_task("say=working", "await=never", key="interrupted")
    with pytest.raises(KeyboardInterrupt):
        Attempts(launcher, tracker, interrupt).run(task)
    [run] = runs_of(tracker, task)
    assert (run.status, run.tags[Tag.PURPOSE]) == ("KILLED", "failed")
    assert run.metrics["cost_usd"] > 0
    assert not launcher.poll(Handle.from_json(run.tags[Tag.HANDLE])).running


def test_an_error_of_the_caller_leaves_the_task_alone(
    tracker: Tracker, launcher: Counting, make_task: MakeTask
) -> None:
    def broken(line: str) -> None:
        raise OSError("no space left")

    task = make_task("say=working", "await=go", "finish", key="callers")
    with pytest.raises(OSError, match="no space") as error:
        Attempts(launcher, tracker, broken).run(task)
    assert "run the step again to wait for it" in error.value.__notes__[0]
    (task.out / "go").touch()
    assert Attempts(launcher, tracker).run(task).attached
    assert len(launcher.launched) == 1


def test_a_launch_that_fails_closes_its_run(tracker: Tracker, make_task: MakeTask) -> None:
    task = make_task("finish", key="nolaunch")
    nowhere = LocalLauncher(root=Path("/nowhere"))
    with pytest.raises(FileNotFoundError):
        Attempts(nowhere, tracker).run(task)
    [run] = runs_of(tracker, task)
    assert (run.status, run.tags[Tag.PURPOSE]) == ("FAILED", "failed")
    assert "cost_usd" in run.metrics


def test_another_launchers_run_is_not_touched(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    task = make_task("finish", key="other")
    tags: dict[str, str] = {Tag.STEP_KEY: task.key, Tag.HANDLE: Handle("skypilot", {}).to_json()}
    run_id = tracker.open(task.experiment, task.name, tags)
    with pytest.raises(ComputeError, match="skypilot"):
        Attempts(launcher, tracker).run(task)
    assert tracker.get(run_id).status == "RUNNING"
    assert launcher.launched == []
    tracker.close(run_id)


def test_a_damaged_result_says_what_to_do(tracker: Tracker, launcher: Counting, make_task: MakeTask) -> None:
    task = replace(make_task(key="damaged"))
    (task.out / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(ComputeError, match="remove the file to run the step again"):
        Attempts(launcher, tracker).run(task)
