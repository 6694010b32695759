"""The supervisor by itself: what it prints, records and refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.compute.local import ROOT
from infra.compute.supervise import BUSY, main, ranks


def supervised(out: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the supervisor as the launcher does; it returns as soon as it has detached."""
    call = [sys.executable, "-m", "infra.compute.supervise", str(out), "run1", "--", *command]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def record_of(out: Path) -> dict[str, object]:
    """The record, once the command has ended."""
    deadline = time.monotonic() + 30
    while True:
        if (out / "attempt.json").is_file():
            record: dict[str, object] = json.loads((out / "attempt.json").read_text())
            if record["exit_code"] is not None:
                return record
        assert time.monotonic() < deadline, "the command did not end"
        time.sleep(0.02)


def test_it_detaches_and_records_the_end(tmp_path: Path) -> None:
    done = supervised(tmp_path / "new", sys.executable, "-c", "print('out'); raise SystemExit(4)")
    assert done.returncode == 0
    record = record_of(tmp_path / "new")
    assert (record["run_id"], record["exit_code"], record["pid"]) == ("run1", 4, int(done.stdout))
    assert (tmp_path / "new" / "task.log").read_text() == "out\n"
    assert (tmp_path / "new" / "heartbeat").is_file()


def test_a_command_that_does_not_exist_is_127(tmp_path: Path) -> None:
    supervised(tmp_path, "no-such-program-anywhere")
    assert record_of(tmp_path)["exit_code"] == 127
    assert "cannot start no-such-program-anywhere" in (tmp_path / "task.log").read_text()


def test_what_the_command_leaves_running_is_stopped(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    supervised(tmp_path, sys.executable, "-c", child)
    assert record_of(tmp_path)["exit_code"] == 0
    pid = int((tmp_path / "task.log").read_text())
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.02)


def test_a_taken_folder_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.compute.supervise.LOCK_SECONDS", 0.0)
    supervised(tmp_path, sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
    deadline = time.monotonic() + 30
    while (tmp_path / "task.log").read_text() != "up\n":
        assert time.monotonic() < deadline, "the command did not start"
        time.sleep(0.02)
    try:
        assert main([str(tmp_path), "run2", "--", "true"]) == BUSY
        assert "still runs" in capsys.readouterr().err
    finally:
        subprocess.run(["kill", str(json.loads((tmp_path / "attempt.json").read_text())["pid"])], check=True)
    assert record_of(tmp_path)["run_id"] == "run1"


def test_what_left_the_group_is_found_by_its_run_and_folder_and_stopped(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time\n"
        "words = ['-c', 'import time; time.sleep(60)', '--out', sys.argv[1], '--run-id', 'run1']\n"
        "subprocess.Popen([sys.executable, *words], start_new_session=True)\n"
        "time.sleep(1)\n"
    )
    command = [sys.executable, "-c", child, str(tmp_path)]
    supervised(tmp_path, *command)
    deadline = time.monotonic() + 30
    while not (found := ranks(tmp_path, "run1")):
        assert time.monotonic() < deadline, "the child did not start"
        time.sleep(0.02)
    assert ranks(tmp_path, "run2") == ranks(tmp_path / "another", "run1") == []
    assert record_of(tmp_path)["exit_code"] == 0
    assert len(found) == 1
    while ranks(tmp_path, "run1"):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
