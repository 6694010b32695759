"""Attempts: from a task to its result, with an MLflow run that is opened before a machine and closed with its cost.

The order is the point (no run, no spend): the tracking store must answer, the run is opened, the task is launched, the
handle is written on the run. Whoever comes after a crash at any of these lines finds a run that is still open, asks the
launcher about it, and waits for it, takes its result, or closes it with what it cost before trying again.
"""

import json
import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.compute.resume import Parent, parent_run, pauses, settle_parents, worth_another
from infra.compute.supervise import LOG
from infra.compute.task import (
    HUNG,
    OUT_OF_MEMORY,
    RANK_LOST,
    ComputeError,
    Handle,
    Launcher,
    Task,
    TaskFailed,
    TaskState,
)
from infra.ledger import Purpose, bill
from infra.prices import price
from infra.runs import Bill, RunRecord, Status, Tag
from infra.tracking import Tracker
from infra.workspace import RESULT

FIRST_PAUSE_SECONDS, PAUSE_GROWTH = 0.05, 1.5
FIRST_RETRY_SECONDS = 5.0
CODES = {HUNG: "hung", OUT_OF_MEMORY: "ran out of memory", RANK_LOST: "lost a rank"}
_ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Failed|Warning)\b")


@dataclass(frozen=True)
class Outcome:
    """What became of a task: the run that made its result, `result.json`, and what this attempt cost.

    `reused`: the step had finished before and nothing was started. `attached`: the result is from a task that an
    earlier orchestrator had started. `run_id` is empty when a reused step has no finished run on record.
    """

    run_id: str
    state: TaskState
    result: Mapping[str, Any]
    cost_usd: float
    reused: bool = False
    attached: bool = False


@dataclass(frozen=True)
class Attempts:
    """Runs tasks on one launcher, one MLflow run an attempt; `say` gets the log line by line while a task runs.

    A task that resumes is started again after an ending that may not come again, first after `pause_seconds`, up to
    its `retries`; its attempts belong to one parent run.
    """

    launcher: Launcher
    tracker: Tracker
    say: Callable[[str], None] = lambda line: None
    pause_seconds: float = FIRST_RETRY_SECONDS

    def run(self, task: Task) -> Outcome:
        """Bring a task to its result, starting it only if nobody has.

        Raises TrackingError before anything is started when the tracking store does not answer, TaskFailed when the
        task ends without a result and without retries left, ComputeError when it cannot be launched. An interrupt
        (Ctrl-C, a terminated Dagster step) stops the task; any other error leaves it running, for the next call to wait
        for.
        """
        self.tracker.check()
        if task.retries is None:
            return self._attempt(task)
        with parent_run(self.tracker, task) as parent:
            for number, pause in enumerate(pauses(self.pause_seconds, task.retries), 1):
                try:
                    return self._attempt(task, parent)
                except TaskFailed as failure:
                    if not worth_another(failure):
                        raise
                    self.say(f"{failure.first_line}; starting it again in {pause:g} s ({number} of {task.retries})")
                    time.sleep(pause)
            return self._attempt(task, parent)

    def _attempt(self, task: Task, parent: Parent | None = None) -> Outcome:
        """Take over what an earlier orchestrator started, use what is there, or start the task once."""
        earlier = self._earlier(task)
        for record in (r for r in earlier if r.status == Status.RUNNING):
            if outcome := self._take_over(task, record):
                return outcome
        if task.finished:
            done = next((r.run_id for r in earlier if r.status == Status.FINISHED), "")
            return Outcome(done, TaskState("succeeded"), _result(task.out), cost_usd=0.0, reused=True)
        log = _Log(task.out / LOG)
        above: dict[str, str] = {Tag.PARENT: parent.open()} if parent else {}
        record, handle = self._launch(task, {**_tags(task, len(earlier) + 1), **above})
        return self._see_through(task, record, handle, log)

    def settle(self) -> list[str]:
        """Close every open run of this launcher whose task has ended, with its cost, and return the run ids.

        For the runs of an orchestrator that never came back; runs whose tasks still work are left alone.
        """
        closed = []
        for record in self.tracker.runs(None, f"attributes.status = '{Status.RUNNING}'"):
            handle = Handle.from_json(record.tags[Tag.HANDLE]) if Tag.HANDLE in record.tags else None
            if handle is None or handle.launcher != self.launcher.name:
                continue
            try:
                state = self.launcher.poll(handle)
            except ComputeError:
                continue  # another host's; it settles its own
            if not state.running:
                self._close(record, state, finished=(Path(record.tags[Tag.OUT]) / RESULT).is_file())
                self.launcher.cancel(handle)
                closed.append(record.run_id)
        settle_parents(self.tracker)
        return closed

    def _earlier(self, task: Task) -> list[RunRecord]:
        """Runs of this very step with these very inputs, newest first."""
        records = self.tracker.runs(task.experiment, f"tags.{Tag.STEP_KEY} = '{task.key}'")
        return [record for record in records if record.name == task.name]

    def _take_over(self, task: Task, record: RunRecord) -> Outcome | None:
        """Wait for the task of an open run, or take its result; None, and the run closed, if there is neither."""
        if Tag.HANDLE in record.tags:
            handle = Handle.from_json(record.tags[Tag.HANDLE])
        else:
            found = self.launcher.find(task, record.run_id, record.started.timestamp())
            if found is None:
                self._close(record, _never_started(record), finished=False)
                return None
            handle = found
            self.tracker.tag(record.run_id, {Tag.HANDLE: handle.to_json()})
        log = _Log(task.out / LOG)
        state = self.launcher.poll(handle)
        if state.running:
            self.say(f"{task.name} runs already; waiting for run {record.run_id}")
            return self._see_through(task, record, handle, log, attached=True)
        cost = self._close(record, state, task.finished)
        self.launcher.cancel(handle)
        if not task.finished:
            self.say(f"{task.name}: run {record.run_id} is {state.status}, closed at ${cost:.4f}; trying again")
            return None
        return Outcome(record.run_id, state, _result(task.out), cost, attached=True)

    def _launch(self, task: Task, tags: Mapping[str, str]) -> tuple[RunRecord, Handle]:
        """Open a run, start the task, and write its handle on the run; whatever goes wrong, nothing keeps running."""
        run_id = self.tracker.open(task.experiment, task.name, tags)
        record = self.tracker.get(run_id)
        handle = None
        try:
            handle = self.launcher.submit(task, run_id, self.tracker.uri)
            self.tracker.tag(run_id, {Tag.HANDLE: handle.to_json()})
        except BaseException as error:
            if handle is not None:
                self.launcher.cancel(handle)
            now = time.time()
            state = TaskState("failed", started=record.started.timestamp(), ended=now, tail=str(error))
            self._close(record, state, finished=False)
            raise
        return record, handle

    def _see_through(
        self, task: Task, record: RunRecord, handle: Handle, log: "_Log", attached: bool = False
    ) -> Outcome:
        """Wait for the task, close its run, give the machine back, and hand over the result or the failure."""
        try:
            state = self._wait(handle, log)
        except Exception as error:
            error.add_note(f"{task.name} goes on as run {record.run_id}; run the step again to wait for it")
            raise
        except BaseException:
            self.launcher.cancel(handle)
            self._close(record, self._cut_off(record, handle), finished=task.finished, interrupted=True)
            raise
        cost = self._close(record, state, task.finished)
        self.launcher.cancel(handle)
        if not task.finished:
            raise TaskFailed(_explain(task, state, self.tracker.url(record.run_id)), state)
        return Outcome(record.run_id, state, _result(task.out), cost, attached=attached)

    def _cut_off(self, record: RunRecord, handle: Handle) -> TaskState:
        """State of a task that was cancelled: preempted where it saved its place, failed where it could not."""
        with suppress(ComputeError):
            state = self.launcher.poll(handle)
            if state.status == "preempted":
                return state
        return TaskState("failed", started=_start(record, handle), ended=time.time())

    def _wait(self, handle: Handle, log: "_Log") -> TaskState:
        pause = FIRST_PAUSE_SECONDS
        while True:
            state = self.launcher.poll(handle)
            for line in log.lines():
                self.say(line)
            if not state.running:
                return state
            time.sleep(pause)
            pause = min(pause * PAUSE_GROWTH, self.launcher.pause_seconds)

    def _close(self, record: RunRecord, state: TaskState, finished: bool, interrupted: bool = False) -> float:
        """Close a run with status, purpose and bill; the dollars. A result on disk is success, whatever came after."""
        started = state.started if state.started is not None else record.started.timestamp()
        ended = state.ended if state.ended is not None else self._last_sign(record)
        metrics = bill(max(0.0, ended - started), int(record.tags[Tag.DEVICES]), price(record.tags[Tag.PRICE_ROW]))
        if finished:
            self.tracker.close(record.run_id, Status.FINISHED, metrics)
            return metrics[Bill.COST_USD]
        purpose = Purpose.PREEMPTED if state.status == "preempted" else Purpose.FAILED
        killed = interrupted or state.status in ("preempted", "lost")
        tags: dict[str, str] = {Tag.PURPOSE: purpose, Tag.INTENDED_PURPOSE: record.tags[Tag.PURPOSE]}
        self.tracker.close(record.run_id, Status.KILLED if killed else Status.FAILED, metrics, tags)
        return metrics[Bill.COST_USD]

    def _last_sign(self, record: RunRecord) -> float:
        """When a task that left no end was last heard of on its run; now, if it never was: a bill may err upwards."""
        tags = self.tracker.get(record.run_id).tags
        return datetime.fromisoformat(tags[Tag.HEARTBEAT]).timestamp() if Tag.HEARTBEAT in tags else time.time()


class _Log:
    """The lines that are added to a log file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.is_file() else 0

    def lines(self) -> list[str]:
        """Whole lines that came since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


def _tags(task: Task, number: int) -> dict[str, str]:
    """Everything that the ledger and a later orchestrator need to know about an attempt."""
    hardware, row = task.resources, price(task.resources.price_row)
    return {
        Tag.STEP: task.name,
        Tag.PURPOSE: task.purpose,
        Tag.ACCELERATORS: hardware.accelerators,
        Tag.DEVICES: str(hardware.devices),
        Tag.NODES: str(hardware.nodes),
        Tag.PRICE_ROW: row.id,
        Tag.USD_PER_HOUR: str(row.usd_per_hour),
        **task.tags,
        Tag.STEP_KEY: task.key,
        Tag.ATTEMPT: str(number),
        Tag.OUT: str(task.out),
    }


def _start(record: RunRecord, handle: Handle) -> float:
    return float(handle.data["started"]) if "started" in handle.data else record.started.timestamp()


def _never_started(record: RunRecord) -> TaskState:
    """State of a run whose orchestrator died before it launched anything: it cost nothing."""
    return TaskState("lost", started=record.started.timestamp(), ended=record.started.timestamp())


def _result(out: Path) -> Mapping[str, Any]:
    path = out / RESULT
    try:
        result: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ComputeError(f"{path} is not JSON ({error}); remove the file to run the step again") from error
    return result


def _explain(task: Task, state: TaskState, url: str) -> str:
    """Why a task has no result: its last word first, then the lines before it, then where to look."""
    lines = [line for line in state.tail.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    if state.status == "succeeded":
        said = f"it ended without error but wrote no {RESULT}"
    elif state.reason:
        said = state.reason
    else:
        said = (errors or lines or ["it said nothing"])[-1].strip()
    block = "\n".join(f"  | {line}" for line in lines[-20:])
    log = f"the whole log: {task.out / LOG}"
    return "\n".join(part for part in (f"{task.name} {_ending(state)}: {said}", block, f"run: {url}", log) if part)


def _ending(state: TaskState) -> str:
    code = state.exit_code
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    words = {"lost": "was lost with its machine or supervisor", "preempted": "was preempted"}
    if code in CODES:
        return CODES[code]
    return words.get(state.status, "failed" if code is None else f"failed (exit code {code})")
