"""The servers, started for real over an empty workspace."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.settings import TELEMETRY_OFF, Settings
from infra.tracking import RunLog, Tracker
from infra.workspace import Workspace
from orchestration import servers

DEFINITIONS = "import dagster as dg\n\n@dg.asset\ndef one():\n    return 1\n\ndefs = dg.Definitions(assets=[one])\n"
SERVE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from infra.settings import Settings
from orchestration.servers import serve
serve(Settings(), definitions="small")
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A Dagster instance of this test's own, with one asset."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "dagster.yaml").write_bytes((servers.REPOSITORY / "dagster.yaml").read_bytes())
    (folder / "small.py").write_text(DEFINITIONS, encoding="utf-8")
    return folder


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """Somebody else's server: a port that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.slow
def test_both_servers_come_up_on_free_ports_and_leave_nothing_behind(workspace: Workspace, home: Path) -> None:
    """Slow: starts MLflow and Dagster for real (25 s on a quiet machine)."""
    with listener() as first, listener() as second:
        settings = Settings(workspace=workspace.root, dagster_port=first, mlflow_port=second)
        run_id = a_run_with_a_note(settings.tracking_uri, workspace.root / "note.txt")
        with servers.running(settings, home, "small") as (addresses, started):
            assert not {first, second} & {int(url.rsplit(":", 1)[1]) for url in (addresses.dagster, addresses.mlflow)}
            assert read(addresses.mlflow + "/health") == "OK"
            assert read(addresses.mlflow + "/api/2.0/mlflow/experiments/search?max_results=5", "experiments")
            assert query(addresses.dagster, "{ assetNodes { assetKey { path } } }") == {
                "assetNodes": [{"assetKey": {"path": ["one"]}}]
            }
            run = read(f"{addresses.mlflow}/api/2.0/mlflow/runs/get?run_id={run_id}", "run")
            assert run["info"]["run_name"] == "early"
            assert read(f"{addresses.mlflow}/get-artifact?path=files/note.txt&run_uuid={run_id}") == "kept"
            family = [child for server in started for child in tree(server.process.pid)]
            assert len(family) >= 5
            code_server = psutil.Process(started[1].process.pid).environ()
            assert code_server["OPENSORA_MLFLOW_URL"] == addresses.mlflow
            assert TELEMETRY_OFF.items() <= code_server.items()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert {path.name for path in home.iterdir()} <= {".dagster", "dagster.yaml", "small.py", "__pycache__"}


@pytest.mark.slow
def test_serve_stops_on_sigterm_though_its_shell_ignores_signals(workspace: Workspace, home: Path) -> None:
    """Slow: starts both servers as a script's background job would, with SIGINT ignored (25 s on a quiet machine)."""
    env = {
        **os.environ,
        "OPENSORA_WORKSPACE": str(workspace.root),
        **free_ports(),
        "PYTHONPATH": str(servers.REPOSITORY),
    }
    command = [sys.executable, "-u", "-c", SERVE]
    with subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        family = tree(process.pid)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    assert lines[0].startswith("Dagster  http://127.0.0.1:"), lines
    assert lines[1].startswith("MLflow   http://127.0.0.1:"), lines
    assert rest == "Stopped.\n"
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit('no such table')"], stderr=stream)
    server = servers.Server("Dagster", process, "http://127.0.0.1:9", "/", log)
    with pytest.raises(servers.ServerError, match=r"Dagster ended with exit status 1(.|\n)*no such table"):
        server.wait_until_up(30)


def test_a_silent_server_is_given_up_and_its_stubborn_children_are_killed(tmp_path: Path) -> None:
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); time.sleep(600)"
    log = tmp_path / "log"
    process = servers._start([sys.executable, "-c", script], tmp_path, os.environ, log)
    server = servers.Server("MLflow", process, "http://127.0.0.1:9", "/", log)
    with pytest.raises(servers.ServerError, match="did not answer"):
        server.wait_until_up(0.5)
    wait_for(lambda: "deaf" in log.read_text())
    family = tree(process.pid)
    server.stop()
    assert len(family) == 2
    assert not [member for member in family if member.is_running()]


def test_a_taken_port_is_replaced_and_a_free_one_kept() -> None:
    with listener() as taken:
        assert servers.free_port("127.0.0.1", taken) not in (0, taken)
    assert servers.free_port("127.0.0.1", taken) == taken


def test_the_environment_hands_every_setting_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(workspace=workspace.root, recipes="v2_0,other", mlflow_url="http://127.0.0.1:5055")
    env = servers.environment(settings, workspace.root)
    for name in [name for name in env if name.startswith("OPENSORA_")]:
        monkeypatch.setenv(name, env[name])
    assert Settings() == settings
    assert env["DAGSTER_HOME"] == str(workspace.root)


def test_the_instance_is_the_folder_one_stands_in(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(home)
    assert servers.default_home() == home
    monkeypatch.chdir(tmp_path)
    assert servers.default_home() == servers.REPOSITORY


def a_run_with_a_note(tracking_uri: str, note: Path) -> str:
    """What a task leaves behind: a closed run with a file, written straight into the store."""
    tracker = Tracker(tracking_uri)
    run_id = tracker.open("walk", "early")
    note.write_text("kept", encoding="utf-8")
    log = RunLog(tracking_uri, run_id)
    log.artifact(note)
    log.close()
    tracker.close(run_id)
    return run_id


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything it started."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def free_ports() -> dict[str, str]:
    return {f"OPENSORA_{name}_PORT": str(servers.free_port("127.0.0.1", 0)) for name in ("DAGSTER", "MLFLOW")}


def read(url: str, key: str | None = None) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    return json.loads(text)[key] if key else text


def query(url: str, text: str) -> object:
    body = json.dumps({"query": text}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["data"]


def wait_for(condition, timeout_seconds: float = 20) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
