"""How a task of several processes ended: what the one that knew wrote down, because torchrun replaces exit codes.

    stopped.json   {run_id, code, reason, step, rank} of the process that stopped first and knew why

A rank that was killed writes nothing; then torchrun's report at the end of the log says which one it was. A rank that
could not even write, because it never let go of the interpreter, leaves its stacks.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from infra.compute.task import HUNG, PREEMPTED, RANK_LOST, STACKS, STOPPED, TaskState

_TORCHRUN_FAILURE = re.compile(r"^  rank +: (\d+) .*\n  exitcode +: (-?\d+) ", re.MULTILINE)
_TORCHRUN_STOPPED = re.compile(r"SignalException: Process \d+ got signal: (\d+)")


@dataclass(frozen=True)
class Ending:
    """Why a training stopped early: exit code, reason in words, the step it stood at, and the rank that says so."""

    run_id: str
    code: int
    reason: str
    step: int
    rank: int

    def write(self, folder: Path) -> None:
        """Write `stopped.json`, whole; the first word of a run stands, unless it only was that a rank was gone."""
        said = self.read(folder, self.run_id)
        if said is not None and said.code != RANK_LOST:
            return
        partial = folder / f"{STOPPED}.{self.rank}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(partial, folder / STOPPED)

    @classmethod
    def read(cls, folder: Path, run_id: str) -> Self | None:
        """The record of this very run; None where there is none, or none that can be read."""
        try:
            found = cls(**json.loads((folder / STOPPED).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.run_id == run_id else None

    def __str__(self) -> str:
        return f"{self.reason} (rank {self.rank}, at step {self.step})"


def explained(state: TaskState, out: Path, run_id: str) -> TaskState:
    """A state that has ended, with the true exit code and the reason where its processes or torchrun left them."""
    if state.status != "failed":
        return state
    code, reason = next(_accounts(state, out, run_id), (state.exit_code, ""))
    status = "preempted" if code == PREEMPTED else state.status
    return replace(state, status=status, exit_code=code, reason=reason)


def _accounts(state: TaskState, out: Path, run_id: str) -> Iterator[tuple[int, str]]:
    """Exit codes with reasons, the one to believe first."""
    ending = Ending.read(out, run_id)
    if ending is not None and ending.code != RANK_LOST:
        yield ending.code, str(ending)
    # The root cause stands last. Where several ranks ended within a second torchrun may take an echo for it; the others
    # it stops itself, by SIGTERM first.
    failures = [(int(rank), int(code)) for rank, code in reversed(_TORCHRUN_FAILURE.findall(state.tail))]
    for rank, code in failures if ending else failures[:1]:
        if code < 0 and code != -signal.SIGTERM:
            yield code, f"rank {rank} was killed by {signal.Signals(-code).name}"
    if ending is not None:
        yield ending.code, str(ending)
    for number in _TORCHRUN_STOPPED.findall(state.tail)[-1:]:
        yield -int(number), f"torchrun was stopped by {signal.Signals(int(number)).name}, and no rank saved its place"
    hung = sorted(file for file in out.glob(f"{STACKS}/*.txt") if _written(file, state.started or 0.0))
    if hung:
        yield HUNG, f"no step for too long; the stacks are in {hung[0]}"
    for rank, code in failures[:1]:
        yield code, f"rank {rank} ended first, with exit code {code}"


def _written(file: Path, since: float) -> bool:
    return file.stat().st_size > 0 and file.stat().st_mtime >= since
