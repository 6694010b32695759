"""The door of SkyPilot: a task becomes a cluster of its own, on Slurm, Kubernetes or any cloud, that goes when it ends.

The cluster is named after the MLflow run, so that asking twice launches once, and its autostop takes it down even if
nobody is left to do so. Spot tasks become managed jobs: SkyPilot's controller starts them again when the machine is
taken away, and the task resumes from its checkpoint. A cluster must see the workspace under the same path: a home that
is shared, as Slurm has it, or a bucket in `mounts`. SkyPilot takes two seconds to import: inside functions only.
"""

import copy
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import tenacity
import yaml

from infra.compute.ending import explained
from infra.compute.local import ROOT
from infra.compute.supervise import LOG
from infra.compute.task import ComputeError, Handle, Resources, Status, Task, TaskState, last_lines
from infra.prices import price
from infra.settings import TELEMETRY_OFF

Result = TypeVar("Result")

PYTHON = ".venv-train/bin/python"
SETUP = f"""set -euo pipefail
python3 -m venv .venv-train
{PYTHON} -m pip install --quiet --disable-pip-version-check uv==0.13.9
.venv-train/bin/uv pip install --quiet --python {PYTHON} --compile-bytecode --requirements environments/train.txt
.venv-train/bin/uv pip install --quiet --python {PYTHON} --no-deps --requirements environments/unpinned.txt
"""
TORCHRUN = (
    '{python} -m torch.distributed.run --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" '
    '--master-addr "$(head -n 1 <<< "$SKYPILOT_NODE_IPS")" --master-port 29500 {options} {program}'
)
# What the cluster needs to log to a tracking server that asks who is there; read from the environment, never written.
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
PATIENCE_SECONDS = 600
TRANSIENT = (
    "ApiServerConnectionError",
    "ClusterStatusFetchingError",
    "NetworkError",
    "RequestInterruptedError",
    "ServerTemporarilyUnavailableError",
)
# sky.JobStatus and sky.jobs.ManagedJobStatus by name (skypilot 0.14.1). A job is `lost` when SkyPilot's own driver or
# controller died: nobody knows how the command ended.
STATUSES: dict[str, Status] = {
    "INIT": "running",
    "PENDING": "running",
    "SETTING_UP": "running",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "FAILED_SETUP": "failed",
    "FAILED_DRIVER": "lost",
    "CANCELLED": "failed",
    # managed jobs only
    "SUBMITTED": "running",
    "STARTING": "running",
    "RECOVERING": "running",
    "WINDING_DOWN": "running",
    "CANCELLING": "running",
    "FAILED_PRECHECKS": "failed",
    "FAILED_NO_RESOURCE": "failed",
    "FAILED_CONTROLLER": "lost",
}


@dataclass(frozen=True)
class SkyPilotLauncher:
    """Launches every task on a cluster of its own from `workdir`; `mounts` maps paths on the cluster to buckets."""

    workdir: Path = ROOT
    idle_minutes: int = 10
    mounts: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = SECRETS
    name: ClassVar[str] = "skypilot"
    pause_seconds: ClassVar[float] = 20.0

    def config(self, task: Task, run_id: str, tracking_uri: str) -> dict[str, Any]:
        """The task in SkyPilot's own words, without any secret.

        Raises ComputeError for a tracking store that no cluster can reach or whose address holds a password, and for
        accelerators that the task's price row is not about.
        """
        _check_uri(tracking_uri)
        _check_price(task.resources)
        return {
            "name": cluster_name(run_id),
            "workdir": str(self.workdir),
            "num_nodes": task.resources.nodes,
            "resources": self._resources(task.resources),
            "envs": {**TELEMETRY_OFF, "OPENSORA_RUN_ID": run_id},
            "file_mounts": {path: {"source": url, "mode": "MOUNT_CACHED"} for path, url in self.mounts.items()},
            "setup": SETUP,
            "run": _command(task, run_id, tracking_uri),
        }

    def to_yaml(self, task: Task, run_id: str, tracking_uri: str) -> str:
        """The task as a file for `sky launch`, to look at or to keep."""
        return yaml.safe_dump(self.config(task, run_id, tracking_uri), sort_keys=False)

    def submit(self, task: Task, run_id: str, tracking_uri: str) -> Handle:
        """Ask SkyPilot for the cluster and return at once; a cluster that this run has already is taken as it is.

        Raises ComputeError for a task that SkyPilot does not understand, in SkyPilot's words.
        """
        sky = _sky()
        cluster = cluster_name(run_id)
        wanted = self._sky_task(sky, self.config(task, run_id, tracking_uri))
        managed = task.resources.use_spot
        data = {"cluster": cluster, "run_id": run_id, "managed": managed, "started": time.time()}
        data["out"] = str(task.out.absolute())
        if _guarded(lambda: bool(_managed_rows(sky, cluster) if managed else sky.get(sky.status([cluster])))):
            return Handle(self.name, {**data, "request": ""})
        request = _guarded(
            lambda: sky.jobs.launch(wanted, name=cluster) if managed else sky.launch(wanted, cluster_name=cluster)
        )
        return Handle(self.name, {**data, "request": str(request)})

    def find(self, task: Task, run_id: str, started: float) -> Handle | None:
        """The handle of a run: everything in it follows from the run id."""
        managed, out = task.resources.use_spot, str(task.out.absolute())
        data = {"cluster": cluster_name(run_id), "run_id": run_id, "managed": managed, "request": "", "out": out}
        return Handle(self.name, {**data, "started": started})

    def poll(self, handle: Handle) -> TaskState:
        """Where the task stands; waits up to ten minutes for an API server that does not answer."""
        data = _checked(handle)
        state = _patiently(lambda: _managed_state(_sky(), data) if data["managed"] else _cluster_state(_sky(), data))
        if state.status not in ("failed", "succeeded"):
            return state
        state = replace(state, tail=self.log_tail(handle) or state.tail)
        return explained(state, Path(data["out"]), data["run_id"])

    def cancel(self, handle: Handle) -> None:
        """Stop the job and take its cluster down; one that is gone already is what was wanted."""
        sky, data = _sky(), _checked(handle)
        try:
            if data["managed"]:
                sky.get(sky.jobs.cancel(name=data["cluster"]))
            else:
                sky.get(sky.down(data["cluster"]))
        except Exception as error:
            if type(error).__name__ != "ClusterDoesNotExist":
                raise ComputeError(f"SkyPilot could not take {data['cluster']} down: {error}") from error

    def log_tail(self, handle: Handle) -> str:
        """The last lines of the job; the whole log is saved as `task.log` in the step's folder, where that exists."""
        sky, data = _sky(), _checked(handle)
        out = Path(data["out"])
        if not out.is_dir():
            return ""
        with (out / LOG).open("w+", encoding="utf-8") as stream:
            try:
                if data["managed"]:
                    sky.jobs.tail_logs(name=data["cluster"], follow=False, output_stream=stream)
                else:
                    sky.tail_logs(data["cluster"], None, follow=False, output_stream=stream)
            except Exception as error:  # the cluster may be gone, and its log with it
                stream.write(f"the log could not be read: {error}\n")
        return last_lines((out / LOG).read_text(encoding="utf-8", errors="replace"))

    def _resources(self, wanted: Resources) -> dict[str, Any]:
        size = {"cpus": f"{wanted.per_node}+"} if wanted.on_cpu else {"accelerators": wanted.accelerators}
        place = {"infra": wanted.infra} if wanted.infra else {}
        autostop = {"idle_minutes": self.idle_minutes, "down": True}
        return {**place, **size, "use_spot": wanted.use_spot, "autostop": autostop}

    def _sky_task(self, sky: Any, config: dict[str, Any]) -> Any:
        """SkyPilot's own task, with the secrets that this environment holds."""
        try:
            task = sky.Task.from_yaml_config(copy.deepcopy(config))  # it takes its argument apart
        except Exception as error:
            raise ComputeError(f"SkyPilot does not accept {config['resources']}: {error}") from error
        task.update_secrets({name: os.environ[name] for name in self.secrets if name in os.environ})
        return task


def cluster_name(run_id: str) -> str:
    """Name of the cluster of a run: the run id is the idempotency key."""
    return f"opensora-{re.sub('[^a-z0-9]', '', run_id.lower())[:16]}"


def _command(task: Task, run_id: str, tracking_uri: str) -> str:
    """The shell line of every node: plain Python for one process, torchrun where there are several or several nodes."""
    program = shlex.join(task.program(run_id, tracking_uri))
    if task.processes * task.resources.nodes == 1:
        return f"exec {PYTHON} {program}\n"
    return f"exec {TORCHRUN.format(python=PYTHON, options=shlex.join(task.torchrun), program=program)}\n"


def _check_uri(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        raise ComputeError(
            "a cluster cannot reach a tracking store that is a file on this machine; start an MLflow server and set "
            "OPENSORA_TRACKING_URI to its address"
        )
    if parts.username or parts.password:
        raise ComputeError(
            "the tracking URI holds a user name or password, which would stand in the cluster's task file; put them in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _check_price(wanted: Resources) -> None:
    """SkyPilot takes any accelerator name for a cluster's own; the price book knows which ones are meant."""
    row = price(wanted.price_row)
    if row.gpu != wanted.kind:
        raise ComputeError(
            f"accelerators {wanted.accelerators!r} would be billed by price row {row.id!r}, which is about {row.gpu}; "
            f"name a {row.gpu}, or a price row about {wanted.kind}"
        )


def _cluster_state(sky: Any, data: Mapping[str, Any]) -> TaskState:
    """State of the one job of a cluster, or of the launch that is still under way.

    The queue is asked, not `job_status`: that one cannot say in 0.14.1 that a cluster has no job yet.
    """
    launch = _launch_state(sky, data)
    if launch is not None:
        return launch
    try:
        rows = sky.get(sky.queue(data["cluster"]))
    except Exception as error:
        if type(error).__name__ == "ClusterDoesNotExist":
            return TaskState("lost", started=data["started"])
        if type(error).__name__ == "ClusterNotUpError":  # it was up once: it was stopped, or taken away
            return TaskState("preempted", started=data["started"])
        raise
    if not rows:
        return TaskState("lost", started=data["started"])
    job = max(rows, key=lambda row: int(row["job_id"]))
    return _job_state(job["status"].name, job["end_at"], data)


def _launch_state(sky: Any, data: Mapping[str, Any]) -> TaskState | None:
    """State of a launch that is under way or has failed; None when it is done, or so old that it was forgotten."""
    payloads = sky.api_status([data["request"]]) if data["request"] else []
    status = payloads[0].status if payloads else "SUCCEEDED"
    if status in ("PENDING", "RUNNING"):
        return TaskState("running", started=data["started"])
    if status == "SUCCEEDED":
        return None
    try:
        sky.get(data["request"])
        said = status
    except Exception as error:
        said = str(error)
    return TaskState("failed", started=data["started"], ended=time.time(), tail=f"launch failed: {said}")


def _job_state(status: str, ended: float | None, data: Mapping[str, Any]) -> TaskState:
    """State of a job from SkyPilot's word for it; SkyPilot knows no exit code but that of success."""
    meaning, started = STATUSES[status], data["started"]
    if meaning == "running":
        return TaskState("running", started=started)
    code = 0 if meaning == "succeeded" else None
    return TaskState(meaning, exit_code=code, started=started, ended=ended or time.time(), tail=f"SkyPilot: {status}")


def _managed_rows(sky: Any, name: str) -> list[Any]:
    rows = sky.get(sky.jobs.queue_v2(refresh=False, name_match=name))[0]
    return [row for row in rows if row.job_name == name]


def _managed_state(sky: Any, data: Mapping[str, Any]) -> TaskState:
    """State of a managed job; a recovery is part of its running."""
    rows = _managed_rows(sky, data["cluster"])
    if not rows:
        return _launch_state(sky, data) or TaskState("lost", started=data["started"])
    return _job_state(rows[0].status.name.removeprefix("DEPRECATED_"), rows[0].end_at, data)


def _checked(handle: Handle) -> Mapping[str, Any]:
    if handle.launcher != SkyPilotLauncher.name:
        raise ComputeError(f"handle of launcher {handle.launcher!r} was given to launcher {SkyPilotLauncher.name!r}")
    return handle.data


def _sky() -> Any:
    """SkyPilot, told first not to report its use: it reads the environment of the process that imports it."""
    os.environ.update({key: value for key, value in TELEMETRY_OFF.items() if key not in os.environ})
    try:
        import sky
        import sky.jobs
    except ImportError as error:
        raise ComputeError("SkyPilot is not installed; install the `sky` extra: pip install -e '.[sky]'") from error
    return sky


def _guarded(ask: Callable[[], Result]) -> Result:
    """The answer; raises ComputeError in SkyPilot's words."""
    try:
        return ask()
    except Exception as error:
        raise ComputeError(f"SkyPilot: {error}") from error


def _patiently(ask: Callable[[], Result]) -> Result:
    """The answer, asked again while the API server or the network does not answer; then a ComputeError."""
    transient = tenacity.retry_if_exception(lambda error: type(error).__name__ in TRANSIENT)
    stop, wait = tenacity.stop_after_delay(PATIENCE_SECONDS), tenacity.wait_exponential(min=1, max=30)
    return _guarded(lambda: tenacity.Retrying(retry=transient, stop=stop, wait=wait, reraise=True)(ask))
