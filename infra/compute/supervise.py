"""The supervisor of one local task: `python -m infra.compute.supervise OUT RUN_ID -- COMMAND...`.

It detaches from whoever called it, runs the command, and leaves in OUT what a later orchestrator needs to know:

    task.log      what the command said, appended over all attempts
    heartbeat     touched every second while the command runs; locked, so that one folder has one writer
    attempt.json  run id, start, and, once it has ended, the end and the exit code

Standard library only: this process stays for as long as the task does.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ATTEMPT, HEARTBEAT, LOG = "attempt.json", "heartbeat", "task.log"
BEAT_SECONDS = 1.0
GRACE_SECONDS = 15.0
LOCK_SECONDS = 3.0
BUSY = 75  # sysexits.h EX_TEMPFAIL: try again later


def main(argv: Sequence[str] | None = None) -> int:
    """Lock the folder, detach, and print the supervisor's process id; exits with 75 when the folder is taken."""
    parser = argparse.ArgumentParser(description="run one command as a task that outlives its caller")
    parser.add_argument("out", type=Path)
    parser.add_argument("run_id")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    args.out.mkdir(parents=True, exist_ok=True)
    lock = _lock(args.out / HEARTBEAT)
    if lock is None:
        print(f"{args.out} is locked by an attempt that still runs", file=sys.stderr)
        return BUSY
    pid = os.fork()
    if pid:
        print(pid)
        return 0
    with lock:
        _detach(args.out / LOG)
        return supervise(args.out.absolute(), args.run_id, command, lock, args.grace)


def supervise(out: Path, run_id: str, command: Sequence[str], lock: IO[bytes], grace_seconds: float) -> int:
    """Run the command to its end, beating once a second, and record how it ended."""
    record = {"run_id": run_id, "pid": os.getpid(), "started": time.time(), "ended": None, "exit_code": None}
    _write(out / ATTEMPT, record)
    try:
        # The lock goes to the command too: were this process killed, the folder stays taken while the command lives.
        child = subprocess.Popen(command, process_group=0, pass_fds=(lock.fileno(),))
    except OSError as error:
        print(f"cannot start {command[0] if command else 'an empty command'}: {error}", file=sys.stderr)
        _write(out / ATTEMPT, {**record, "ended": time.time(), "exit_code": 127})
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _terminate(child, grace_seconds))
    # Slurm's notice that time is nearly over: the command may make use of it.
    signal.signal(signal.SIGUSR1, lambda *_: _signal_group(child, signal.SIGUSR1))
    exit_code = _wait(child, out / HEARTBEAT)
    _signal_group(child, signal.SIGKILL)
    for pid in ranks(out, run_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _write(out / ATTEMPT, {**record, "ended": time.time(), "exit_code": exit_code})
    return 0


def ranks(out: Path, run_id: str) -> list[int]:
    """Ids of the processes that work in `out` for this run: torchrun puts each rank into a session of its own.

    They are known by their command lines, which `Task.program` ends; nothing is found where there is no /proc.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(entry.parent.name)
        with contextlib.suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            ours = ("--run-id", run_id) in itertools.pairwise(words)
            if ours and pid != os.getpid() and any(os.path.abspath(word) == str(out) for word in words):
                found.append(pid)
    return found


def _lock(path: Path) -> IO[bytes] | None:
    """The folder's lock, or None if another attempt keeps it; a dying one gets a few seconds to let go."""
    stream = path.open("ab")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except OSError:
            if time.monotonic() > deadline:
                stream.close()
                return None
            time.sleep(0.2)


def _detach(log: Path) -> None:
    """Leave the caller's session and streams; the log takes over standard output and error."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with log.open("ab") as stream, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def _wait(child: subprocess.Popen[bytes], heartbeat: Path) -> int:
    """Exit code of the command, negative for a signal."""
    while True:
        os.utime(heartbeat)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=BEAT_SECONDS)


def _terminate(child: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Ask the command's whole group to stop now, and make it stop after the grace."""
    _signal_group(child, signal.SIGTERM)
    signal.signal(signal.SIGALRM, lambda *_: _signal_group(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, grace_seconds)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _write(path: Path, record: dict[str, object]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
