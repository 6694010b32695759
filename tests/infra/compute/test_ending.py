import json
import os
import signal
from pathlib import Path

import pytest

from infra.compute.ending import Ending, explained
from infra.compute.task import HUNG, OUT_OF_MEMORY, PREEMPTED, RANK_LOST, TaskState

FAILED = TaskState("failed", exit_code=1, started=100.0, ended=200.0)
# The end of torchrun's report (torch 2.13), of a rank that was killed.
REPORT = """
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_20:00:00
  host      : node
  rank      : 5 (local_rank: 1)
  exitcode  : {code} (pid: 4242) {name}
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 4242
============================================================"""


def test_the_first_word_of_a_run_stands(tmp_path: Path) -> None:
    first = Ending("r1", OUT_OF_MEMORY, "too large", 7, 3)
    first.write(tmp_path)
    Ending("r1", 1, "an echo", 7, 0).write(tmp_path)
    assert Ending.read(tmp_path, "r1") == first
    assert Ending.read(tmp_path, "r2") is None, "another attempt's"
    Ending("r2", PREEMPTED, "SIGTERM", 9, 0).write(tmp_path)
    assert Ending.read(tmp_path, "r2") is not None
    assert [file.name for file in tmp_path.iterdir()] == ["stopped.json"]


def test_that_a_rank_was_gone_gives_way_to_why(tmp_path: Path) -> None:
    Ending("r1", RANK_LOST, "gone", 7, 0).write(tmp_path)
    Ending("r1", 1, "ValueError: no column", 7, 1).write(tmp_path)
    assert explained(FAILED, tmp_path, "r1").reason == "ValueError: no column (rank 1, at step 7)"


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"run_id": "r1"})])
def test_a_damaged_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "stopped.json").write_text(text)
    assert Ending.read(tmp_path, "r1") is None
    assert explained(FAILED, tmp_path, "r1") == FAILED


def test_a_task_that_saved_its_place_was_preempted(tmp_path: Path) -> None:
    Ending("r1", PREEMPTED, "asked to stop (SIGTERM)", 7, 0).write(tmp_path)
    state = explained(FAILED, tmp_path, "r1")
    assert (state.status, state.exit_code, state.started, state.ended) == ("preempted", PREEMPTED, 100.0, 200.0)
    alone = explained(TaskState("failed", exit_code=PREEMPTED), tmp_path, "r2")
    assert alone.status == "preempted", "one process needs no record: nobody replaced its exit code"


def test_torchruns_report_names_a_rank_that_was_killed(tmp_path: Path) -> None:
    state = TaskState("failed", exit_code=1, tail=REPORT.format(code=-9, name="(SIGKILL)"))
    killed = explained(state, tmp_path, "r1")
    assert (killed.exit_code, killed.reason) == (-signal.SIGKILL, "rank 5 was killed by SIGKILL")
    Ending("r1", RANK_LOST, "gone", 7, 0).write(tmp_path)
    assert explained(state, tmp_path, "r1") == killed, "what the others say of it is an echo"
    ended = explained(TaskState("failed", exit_code=1, tail=REPORT.format(code=3, name="")), tmp_path, "r2")
    assert (ended.exit_code, ended.reason) == (3, "rank 5 ended first, with exit code 3")


def test_stacks_without_a_record_are_of_a_rank_that_could_not_write(tmp_path: Path) -> None:
    file = tmp_path / "stacks" / "rank-00000.txt"
    file.parent.mkdir()
    file.touch()
    assert explained(FAILED, tmp_path, "r1").exit_code == 1, "nothing was dumped"
    file.write_text("Thread 0x1 (most recent call first):")
    os.utime(file, (50.0, 50.0))
    assert explained(FAILED, tmp_path, "r1").exit_code == 1, "an earlier attempt's"
    os.utime(file, (150.0, 150.0))
    state = explained(FAILED, tmp_path, "r1")
    assert (state.exit_code, str(file) in state.reason) == (HUNG, True)


def test_a_success_and_a_running_task_are_left_as_they_are(tmp_path: Path) -> None:
    Ending("r1", PREEMPTED, "SIGTERM", 7, 0).write(tmp_path)
    for state in (TaskState("succeeded", exit_code=0), TaskState("running"), TaskState("lost")):
        assert explained(state, tmp_path, "r1") == state
