"""The embedded launcher: a task is a process on this machine that outlives the orchestrator.

The process is a supervisor (`infra/compute/supervise.py`) in a session of its own. Its handle is a process id with a
creation time, which no other process shares; how it ended is a record in the step's folder. So an orchestrator that
was killed loses nothing: the next one reads the handle, and either waits or learns the exit code.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from infra.compute.ending import explained
from infra.compute.supervise import ATTEMPT, BUSY, HEARTBEAT, LOG, ranks
from infra.compute.task import ComputeError, Handle, Status, Task, TaskState, last_lines
from infra.settings import TELEMETRY_OFF

ROOT = Path(__file__).resolve().parents[2]
TAIL_BYTES = 64 * 1024
START_SECONDS = 60.0
KILL_SECONDS = 5.0
SILENT_SECONDS = 60.0  # a supervisor on another host touches its heartbeat every second
# psutil derives a creation time from the boot time, which the kernel may adjust by a fraction of a second.
SAME_PROCESS_SECONDS = 2.0

# OpenMP's threads spin while they wait for work, which on cores that are shared costs five times the wall time. Read
# when torch loads, so that the task itself is too late to set it.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}

# Ranks of one machine are reached from there alone: gloo listens on loopback, and torchrun leaves it to rank 0 to serve
# what the ranks know of each other (`ml.engines.world`), as its own server listens on every network.
ONE_MACHINE = {
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@dataclass(frozen=True)
class LocalLauncher:
    """Runs tasks as subprocesses of nobody, in `root`, with this interpreter.

    `grace_seconds` between SIGTERM and SIGKILL stands for every task; None is what each task asks for.
    """

    root: Path = ROOT
    grace_seconds: float | None = None
    name: ClassVar[str] = "local"
    pause_seconds: ClassVar[float] = 1.0

    def submit(self, task: Task, run_id: str, tracking_uri: str) -> Handle:
        """Start the task under its supervisor.

        Raises ComputeError for a task of several nodes, and if the folder has a living attempt already.
        """
        if task.resources.nodes > 1:
            raise ComputeError(
                f"{task.name} asks for {task.resources.nodes} nodes, the local launcher has this machine: set "
                "OPENSORA_LAUNCHER=skypilot, or compute.nodes to 1"
            )
        out = task.out.absolute()
        log = out / LOG
        offset = log.stat().st_size if log.is_file() else 0
        grace = self._grace(task)
        options = ["--grace", str(grace)]
        supervise = [sys.executable, "-m", "infra.compute.supervise", *options, str(out), run_id, "--"]
        command = [*supervise, *task.command(sys.executable, run_id, tracking_uri)]
        started = time.time()
        pid = _spawn(command, self.root, _environment(task))
        data = {"pid": pid, "create_time": _create_time(pid), "started": started, "grace": grace, **_machine()}
        return Handle(self.name, {**data, "out": str(out), "run_id": run_id, "log_offset": offset})

    def find(self, task: Task, run_id: str, started: float) -> Handle | None:
        """The handle of a run from what its supervisor wrote into the step's folder."""
        where: dict[str, Any] = {"out": str(task.out.absolute()), "run_id": run_id, "log_offset": 0, **_machine()}
        data = {**where, "started": started, "grace": self._grace(task)}
        record = _record(data)
        if record is None:
            return None
        pid = record["pid"]
        alive = abs(_create_time(pid) - record["started"]) < START_SECONDS
        return Handle(self.name, {**data, "pid": pid, "create_time": _create_time(pid) if alive else 0.0})

    def poll(self, handle: Handle) -> TaskState:
        """Where the task stands; a task whose supervisor was killed is stopped before it is called lost.

        Process ids mean nothing on another host or after a restart: nothing is killed there. Raises ComputeError for a
        task of another host whose folder this one does not see.
        """
        data = _checked(handle)
        if not _here(data):
            return self._elsewhere(handle, data)
        alive = _alive(data)  # before the record is read: a supervisor writes the record, then ends
        record = _record(data)
        if record is not None and record["exit_code"] is not None:
            return self._ended(record, handle)
        if alive:
            return TaskState("running", started=data["started"])
        _kill_session(data)
        return TaskState("lost", started=data["started"], ended=_last_sign(data), tail=self.log_tail(handle))

    def _elsewhere(self, handle: Handle, data: dict[str, Any]) -> TaskState:
        """State of a task of another host, or of this one before it was restarted, by what its folder says."""
        if data["host"] != socket.gethostname() and not Path(data["out"]).is_dir():
            raise ComputeError(f"run {data['run_id']} works on host {data['host']}, in a folder that is not seen here")
        record = _record(data)
        if record is not None and record["exit_code"] is not None:
            return self._ended(record, handle)
        beats = data["host"] != socket.gethostname() and time.time() - _last_sign(data) < SILENT_SECONDS
        if beats:
            return TaskState("running", started=data["started"])
        return TaskState("lost", started=data["started"], ended=_last_sign(data), tail=self.log_tail(handle))

    def cancel(self, handle: Handle) -> None:
        """SIGTERM to the task's group, SIGKILL after the grace; returns when the task has ended.

        Does nothing for a task of another host, or of before a restart.
        """
        data = _checked(handle)
        if not _here(data):
            return
        if _alive(data):
            with contextlib.suppress(ProcessLookupError):
                os.kill(data["pid"], signal.SIGTERM)
        deadline = time.monotonic() + data["grace"] + KILL_SECONDS
        while _alive(data) and time.monotonic() < deadline:
            time.sleep(0.05)
        record = _record(data)
        if record is None or record["exit_code"] is None:
            _kill_session(data)

    def log_tail(self, handle: Handle) -> str:
        """The last lines that this attempt wrote to `task.log`."""
        data = _checked(handle)
        log = Path(data["out"]) / LOG
        if not log.is_file():
            return ""
        with log.open("rb") as stream:
            stream.seek(max(int(data["log_offset"]), log.stat().st_size - TAIL_BYTES))
            return last_lines(stream.read().decode(errors="replace"))

    def _grace(self, task: Task) -> float:
        return task.grace_seconds if self.grace_seconds is None else self.grace_seconds

    def _ended(self, record: dict[str, Any], handle: Handle) -> TaskState:
        """State of a task that has ended, with what it left about it in its folder and its log."""
        code = int(record["exit_code"])
        status: Status = "failed" if code else "succeeded"
        tail = self.log_tail(handle)
        state = TaskState(status, exit_code=code, started=record["started"], ended=record["ended"], tail=tail)
        return explained(state, Path(handle.data["out"]), handle.data["run_id"])


def _spawn(command: list[str], root: Path, environment: dict[str, str]) -> int:
    """Process id of the detached supervisor."""
    done = subprocess.run(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        start_new_session=True,
        check=False,
    )
    if done.returncode == BUSY:
        raise ComputeError(f"{done.stderr.strip()}; wait for it, or stop it, before starting another")
    if done.returncode:
        raise ComputeError(f"the supervisor did not start (exit code {done.returncode}):\n{last_lines(done.stderr)}")
    return int(done.stdout)


def _environment(task: Task) -> dict[str, str]:
    """What the task inherits; its ranks share the cores, where the user has not said otherwise."""
    threads = str(max(1, (os.cpu_count() or 1) // task.processes))
    ranks = {"OMP_NUM_THREADS": threads, **ONE_MACHINE} if task.processes > 1 else {}
    return {**ranks, **os.environ, **TELEMETRY_OFF, **SHARED_CORES}


def _checked(handle: Handle) -> dict[str, Any]:
    """The handle's data; raises ComputeError for a handle of another launcher."""
    if handle.launcher != LocalLauncher.name:
        raise ComputeError(f"handle of launcher {handle.launcher!r} was given to launcher {LocalLauncher.name!r}")
    return dict(handle.data)


def _machine() -> dict[str, str]:
    """Which host, and which of its lives: process ids are unique to both."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else str(psutil.boot_time()),
    }


def _here(data: dict[str, Any]) -> bool:
    return all(data[name] == value for name, value in _machine().items())


def _create_time(pid: int) -> float:
    """When the process was created; 0 if it has ended already, which no living process matches."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _alive(data: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(data["pid"])
        same = abs(process.create_time() - data["create_time"]) < SAME_PROCESS_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _record(data: dict[str, Any]) -> dict[str, Any] | None:
    """What the supervisor of this very run recorded, if it did."""
    path = Path(data["out"]) / ATTEMPT
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if record["run_id"] == data["run_id"] else None


def _last_sign(data: dict[str, Any]) -> float:
    """Last beat of the task's heart, not before its start: the end that a lost task is billed to."""
    path = Path(data["out"]) / HEARTBEAT
    beat = path.stat().st_mtime if path.is_file() else 0.0
    return max(beat, float(data["started"]))


def _kill_session(data: dict[str, Any]) -> None:
    """Kill what is left of a session whose leader, the supervisor, is gone or will not go, and wait for it.

    The ranks that torchrun started have sessions of their own.
    """
    own = ranks(Path(data["out"]), data["run_id"])
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            ours = process.pid in own or os.getsid(process.pid) == data["pid"]
            if ours and process.create_time() >= data["started"] - 1:
                process.kill()
                _wait_for_end(process)


def _wait_for_end(process: psutil.Process) -> None:
    """Return when a killed process holds nothing any more; a zombie that nobody collects counts as gone."""
    deadline = time.monotonic() + KILL_SECONDS
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
