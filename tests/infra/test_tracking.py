"""Runs are opened before anything is spent, and a lost tracking server never ends the work it was told about."""

import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra import tracking
from infra.settings import TELEMETRY_OFF
from infra.tracking import RunLog, Status, Tag, Tracker, TrackingError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_id(tracker: Tracker) -> str:
    return tracker.open("v2_0-tiny", "dit_stage1")


def test_a_run_from_open_to_close(tracker: Tracker) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    run_id = tracker.open("v2_0-tiny", "shots/live", {Tag.STEP: "shots", Tag.DEVICES: 2}, {"detector": "adaptive"})
    opened = tracker.get(run_id)
    assert (opened.status, opened.ended, opened.experiment, opened.name) == ("RUNNING", None, "v2_0-tiny", "shots/live")
    assert opened.tags == {"step": "shots", "devices": "2"}
    assert opened.params == {"detector": "adaptive"}
    assert before < opened.started < datetime.now(UTC) + timedelta(seconds=1)
    tracker.tag(run_id, {Tag.HANDLE: "local:123"})
    tracker.close(run_id, Status.FAILED, {"cost_usd": 0.25}, {Tag.PURPOSE: "failed"})
    closed = tracker.get(run_id)
    assert (closed.status, dict(closed.metrics)) == ("FAILED", {"cost_usd": 0.25})
    assert closed.tags == {"step": "shots", "devices": "2", "handle": "local:123", "purpose": "failed"}
    assert closed.ended is not None
    assert closed.ended >= closed.started


def test_a_closed_run_can_be_opened_again(tracker: Tracker, run_id: str) -> None:
    tracker.close(run_id, Status.FAILED)
    tracker.reopen(run_id)
    assert tracker.get(run_id).status == "RUNNING"
    tracker.close(run_id)
    assert tracker.get(run_id).status == "FINISHED"


def test_a_run_with_a_parent_is_shown_below_it(tracker: Tracker, run_id: str) -> None:
    child = tracker.open("e", "child", {Tag.PARENT: run_id})
    assert [run.run_id for run in tracker.runs(filter=f"tags.mlflow.parentRunId = '{run_id}'")] == [child]


def test_a_status_that_mlflow_does_not_know_is_refused(tracker: Tracker, run_id: str) -> None:
    with pytest.raises(TrackingError, match="SUCCESS"):
        tracker.close(run_id, "SUCCESS")
    assert tracker.get(run_id).status == "RUNNING"


def test_runs_are_found_by_experiment_and_by_tag(tracker: Tracker) -> None:
    assert tracker.runs() == []
    assert tracker.runs("v2_0-tiny") == []
    ids = [tracker.open(e, s, {Tag.STEP: s}) for e, s in (("a", "shots"), ("a", "clips"), ("b", "clips"))]
    assert {run.run_id for run in tracker.runs()} == set(ids)
    assert {run.run_id for run in tracker.runs("a")} == set(ids[:2])
    assert {run.run_id for run in tracker.runs(filter="tags.step = 'clips'")} == set(ids[1:])
    assert [run.experiment for run in tracker.runs("b")] == ["b"]
    with pytest.raises(TrackingError, match=r"(?i)invalid"):
        tracker.runs(filter="step is clips")


def test_no_run_is_lost_between_pages(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PAGE_ROWS", 3)
    ids = [tracker.open("a", str(i)) for i in range(8)]
    assert sorted(run.run_id for run in tracker.runs()) == sorted(ids)


def test_the_url_leads_to_the_run(tracker: Tracker, run_id: str) -> None:
    assert tracker.url(run_id) == f"http://127.0.0.1:5000/#/experiments/1/runs/{run_id}"
    shown = Tracker(tracker.uri, "https://mlflow.example.org/")
    assert shown.url(run_id).startswith("https://mlflow.example.org/#/experiments/1/")


def test_an_unknown_run_is_an_error(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="nope"):
        tracker.get("nope")


def test_threads_share_a_tracker(tracker: Tracker) -> None:
    def walk(number: int) -> str:
        run_id = tracker.open("shared", str(number))
        tracker.close(run_id, Status.FINISHED, {"number": number})
        return run_id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(walk, range(16)))
    found = {run.run_id: run for run in tracker.runs("shared")}
    assert [found[run_id].metrics["number"] for run_id in ids] == list(range(16))


def test_the_global_state_of_mlflow_is_left_alone(tracker: Tracker, run_id: str) -> None:
    import mlflow

    tracker.close(run_id)
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() != tracker.uri


def test_a_tracker_travels_to_other_processes(tracker: Tracker, run_id: str) -> None:
    assert pickle.loads(pickle.dumps(tracker)).get(run_id) == tracker.get(run_id)


@pytest.mark.slow
def test_two_processes_may_make_the_store_together(tmp_path: Path) -> None:
    """Slow: two processes import MLflow side by side and one of them makes every table."""
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    code = f"from infra.tracking import Tracker; print(Tracker({uri!r}).open('e', 'r'))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(Tracker(uri).runs("e")) == 2


def test_a_log_without_a_run_is_silent(tmp_path: Path) -> None:
    for log in (RunLog(), RunLog("http://127.0.0.1:9", None), RunLog(None, "0123")):
        log.metrics({"loss": 1.0}, step=3)
        log.params({"lr": 1e-4})
        log.picture(tmp_path / "missing.png")
        log.heartbeat(tmp_path / "heartbeat")
        assert log.flush()
        log.close()
    assert (tmp_path / "heartbeat").exists()


def test_what_a_task_logs_arrives(tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"picture")
    log = RunLog(tracker.uri, run_id)
    for step in range(2500):
        log.metrics({"loss": 1 / (step + 1)}, step=step)
    log.params({"lr": 1e-4, "long": "x" * 10_000})
    log.picture(picture)
    log.artifact(picture, "notes")
    log.heartbeat()
    log.close()
    run = tracker.get(run_id)
    assert run.metrics["loss"] == 1 / 2500
    assert run.params["lr"] == "0.0001"
    assert len(run.params["long"]) == 6000
    assert datetime.now(UTC) - datetime.fromisoformat(run.tags[Tag.HEARTBEAT]) < timedelta(minutes=1)
    with closing(sqlite3.connect(tracker.uri.removeprefix("sqlite:///"))) as database:
        assert database.execute("select count(*) from metrics where key = 'loss'").fetchone() == (2500,)
    kept = tmp_path / "workspace" / "mlartifacts" / run_id / "artifacts"
    assert (kept / "pictures" / "loss.png").read_bytes() == b"picture"
    assert (kept / "notes" / "loss.png").exists()


def test_the_load_of_the_machine_is_logged(tracker: Tracker, run_id: str) -> None:
    log = RunLog(tracker.uri, run_id)
    log.close()
    metrics = tracker.get(run_id).metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100


def test_a_number_that_is_not_finite_is_told_and_not_charted(tracker: Tracker, run_id: str) -> None:
    log = RunLog(tracker.uri, run_id)
    log.metrics({"loss": float("nan"), "norm": float("inf"), "lr": 0.1}, step=7)
    log.close()
    tracker.close(run_id, Status.FAILED, {"psnr": float("-inf")})
    metrics = {k: v for k, v in tracker.get(run_id).metrics.items() if not k.startswith("system/")}
    assert metrics == {"nonfinite/loss": 1, "nonfinite/norm": 1, "nonfinite/psnr": 1, "lr": 0.1}


def test_a_second_value_of_a_parameter_is_dropped_alone(
    tracker: Tracker, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tracker.uri, run_id)
    log.params({"lr": 1})
    assert log.flush()
    log.params({"lr": 2, "seed": 3})
    log.metrics({"loss": 0.5})
    log.picture(Path("gone.png"))
    log.close()
    run = tracker.get(run_id)
    assert (run.params["lr"], run.params["seed"], run.metrics["loss"]) == ("1", "3", 0.5)
    assert "dropped param lr" in caplog.text
    assert "dropped artifact gone.png" in caplog.text


def test_what_waits_is_sent_at_exit(tracker: Tracker, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    code = f"""
        from pathlib import Path
        from infra.tracking import RunLog
        log = RunLog({tracker.uri!r}, {run_id!r})
        log.metrics({{"loss": 0.5}}, step=1)
        log.picture(Path({str(tmp_path / "a.png")!r}))
        raise SystemExit("the task failed")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 1
    assert tracker.get(run_id).metrics["loss"] == 0.5
    assert list((tmp_path / "workspace" / "mlartifacts").rglob("a.png"))


def test_a_locked_database_does_not_hold_up_a_task(tracker: Tracker, run_id: str) -> None:
    log = RunLog(tracker.uri, run_id)
    assert log.flush()
    with closing(sqlite3.connect(tracker.uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("begin exclusive")
        started = time.monotonic()
        for step in range(1000):
            log.metrics({"loss": 1.0}, step=step)
        assert time.monotonic() - started < 1
        other.execute("rollback")
    log.close()
    assert tracker.get(run_id).metrics["loss"] == 1.0


def test_a_server_that_is_gone_never_ends_a_task(caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    log = RunLog(uri, "0" * 32)
    log.metrics({"loss": 1.0}, step=1)
    started = time.monotonic()
    assert not log.flush()
    log.metrics({"loss": 0.9}, step=2)
    log.close()
    assert time.monotonic() - started < 5
    assert caplog.text.count("records wait and the task goes on") == 1
    assert "were never sent" in caplog.text


@pytest.mark.slow
def test_a_server_that_comes_back_gets_everything(tmp_path: Path) -> None:
    """Slow: an MLflow server takes 10 to 25 seconds to start, and it starts twice."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    with _server(tmp_path, port):
        tracker = Tracker(uri)
        run_id = tracker.open("remote", "run", {Tag.STEP: "shots"})
        log = RunLog(uri, run_id)
        log.metrics({"loss": 1.0}, step=1)
        assert log.flush()
    with pytest.raises(TrackingError, match=uri):
        tracker.check()
    log.metrics({"loss": 0.5, "norm": float("nan")}, step=2)
    assert not log.flush()
    with _server(tmp_path, port):
        (tmp_path / "a.png").touch()
        log.picture(tmp_path / "a.png")
        log.close()
        run = tracker.get(run_id)
        assert (run.metrics["loss"], run.metrics["nonfinite/norm"]) == (0.5, 1)
        assert list((tmp_path / "artifacts").rglob("a.png"))
        tracker.close(run_id)
        assert tracker.url(run_id).startswith(uri)


@contextmanager
def _server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server in a session of its own, so that all of its processes can be stopped."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | TELEMETRY_OFF, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _await(port, process)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _await(port, None)


def _await(port: int, process: "subprocess.Popen[bytes] | None") -> None:
    """Wait until the server of this process answers; without a process, until nobody does."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with closing(socket.socket()) as probe:
            if (probe.connect_ex(("127.0.0.1", port)) == 0) == (process is not None):
                return
        time.sleep(0.2)
    raise AssertionError("the MLflow server did not start, or did not stop")
