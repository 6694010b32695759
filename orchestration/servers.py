"""The two servers a person looks at: Dagster (webserver and daemon) and, over the embedded store, MLflow.

Each runs in a session of its own, so that it can be stopped whatever shell started us: a process started in the
background of a script ignores the signals that would end it, and Dagster takes that over.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from infra.settings import TELEMETRY_OFF, Settings
from infra.tracking import Tracker
from infra.tracking_store import is_http

REPOSITORY = Path(__file__).resolve().parents[1]
DEFINITIONS = "orchestration.definitions"
START_SECONDS = (
    180.0  # MLflow makes its tables on the first start: 25 s on two quiet cores, several times that on busy ones
)
STOP_SECONDS = 20.0  # for a leader to stop what it started
GROUP_SECONDS = 3.0  # for what is left of its group


class ServerError(RuntimeError):
    """A server that did not start or did not stay up, with the end of its log."""


@dataclass(frozen=True)
class Server:
    """One server: the leader of its own process group, where it answers, and where it logs."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    health: str
    log: Path

    def check(self) -> None:
        """Raise ServerError if the process is gone."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
            status = self.process.returncode
            raise ServerError(f"{self.name} ended with exit status {status}; the end of {self.log}:\n{tail}")

    def wait_until_up(self, timeout_seconds: float = START_SECONDS) -> None:
        """Return once the server answers; raises ServerError when it ends first or does not answer in time."""
        deadline = time.monotonic() + timeout_seconds
        while not _answers(self.url + self.health):
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not answer at {self.url} in {timeout_seconds:.0f} s; its log: {self.log}"
                )
            time.sleep(0.25)

    def stop(self) -> None:
        """End the whole group: ask the leader, then everyone left, then insist."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _group_ends(self.process, number):
                return


@dataclass(frozen=True)
class Addresses:
    """Where the running servers answer."""

    dagster: str
    mlflow: str


def serve(settings: Settings, announce: Callable[[str], None] = print, definitions: str = DEFINITIONS) -> None:
    """Run both servers until Ctrl-C or SIGTERM, then stop them and all they started.

    Raises ServerError when one does not come up, or ends by itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    try:
        with running(settings, definitions=definitions) as (addresses, servers):
            announce(f"Dagster  {addresses.dagster}\nMLflow   {addresses.mlflow}\nCtrl-C stops both.")
            while True:
                for server in servers:
                    server.check()
                time.sleep(1.0)
    except KeyboardInterrupt:
        announce("Stopped.")


@contextlib.contextmanager
def running(
    settings: Settings, home: Path | None = None, definitions: str = DEFINITIONS
) -> Iterator[tuple[Addresses, tuple[Server, ...]]]:
    """Both servers, up and answering inside the `with`, gone after it. `home` is the folder with `dagster.yaml`.

    A port that is taken is replaced by a free one. The tables of an embedded store are made first, under its lock: two
    processes must not do that at once. With a remote `tracking_uri` there is no MLflow to start. Raises ServerError,
    and TrackingError when the store cannot be used.
    """
    home = home or default_home()
    logs = home / ".dagster"
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        if not is_http(settings.tracking_uri):
            Tracker(settings.tracking_uri).check()
            servers.append(_stopped_by(stack, start_mlflow(settings, logs)))
            settings = settings.model_copy(update={"mlflow_url": servers[0].url})
        servers.append(_stopped_by(stack, start_dagster(settings, home, definitions)))
        for server in servers:
            server.wait_until_up()
        yield Addresses(dagster=servers[-1].url, mlflow=settings.mlflow_url), tuple(servers)


def start_mlflow(settings: Settings, logs: Path) -> Server:
    """Start the MLflow server over the store that tasks write to, artifacts included."""
    port = free_port(settings.host, settings.mlflow_port)
    settings.space.artifacts.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", settings.host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", settings.tracking_uri, "--artifacts-destination", str(settings.space.artifacts)]
    log = logs / "mlflow-server.log"
    process = _start(command, settings.space.root, {**os.environ, **TELEMETRY_OFF}, log)
    return Server("MLflow", process, f"http://{settings.host}:{port}", "/health", log)


def start_dagster(settings: Settings, home: Path, definitions: str = DEFINITIONS) -> Server:
    """Start Dagster's webserver and daemon in `home`, with the settings handed to everything they start."""
    port = free_port(settings.host, settings.dagster_port)
    url = f"http://{settings.host}:{port}"
    env = environment(settings.model_copy(update={"dagster_url": url}), home)
    command = [sys.executable, "-m", "dagster", "dev", "-m", definitions, "--host", settings.host, "--port", str(port)]
    log = home / ".dagster" / "dagster-dev.log"
    return Server("Dagster", _start(command, home, env, log), url, "/server_info", log)


def environment(settings: Settings, home: Path) -> dict[str, str]:
    """Environment of a Dagster process: ours, these settings, its instance, and every tool's reporting turned off."""
    chosen = {f"OPENSORA_{name.upper()}": str(value) for name, value in settings.model_dump().items()}
    return {**os.environ, **TELEMETRY_OFF, **chosen, "DAGSTER_HOME": str(home)}


def default_home() -> Path:
    """The Dagster instance in use: the working directory if it holds a `dagster.yaml`, else this repository."""
    here = Path.cwd()
    return here if (here / "dagster.yaml").is_file() else REPOSITORY


def free_port(host: str, wanted: int) -> int:
    """`wanted` if nobody listens there, else a free port."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                return int(probe.getsockname()[1])
    raise ServerError(f"no free port on {host}: is this an address of this machine?")


def _stopped_by(stack: contextlib.ExitStack, server: Server) -> Server:
    stack.callback(server.stop)
    return server


def _start(command: list[str], cwd: Path, env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _group_ends(leader: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Signal a process group, and say whether it was gone soon."""
    deadline = time.monotonic() + GROUP_SECONDS
    try:
        os.killpg(leader.pid, number)
        while time.monotonic() < deadline:
            leader.poll()  # reaps it: a dead leader nobody waited for would keep the group alive
            os.killpg(leader.pid, 0)
            time.sleep(0.05)
    except ProcessLookupError:
        return True
    return False


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Turn the first signal into KeyboardInterrupt, and let none disturb the stopping that follows."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
