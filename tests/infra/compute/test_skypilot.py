"""SkyPilot without a cluster: the real SDK checks what we ask for; nothing is launched, no server is started.

One test, marked `slurm`, launches for real. It needs a reachable Slurm cluster configured in `~/.slurm/config` (the ssh
settings of its login node), named by the environment variable SLURM_TEST_CLUSTER as `name` or `name/partition`:

    SLURM_TEST_CLUSTER=lab pytest -m slurm tests/infra/compute/test_skypilot.py
"""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra.compute.skypilot import STATUSES, SkyPilotLauncher, cluster_name
from infra.compute.task import ComputeError, Handle, Resources, Task
from infra.settings import TELEMETRY_OFF
from ml.recipe import Recipe
from ml.sections import Compute

URI = "https://mlflow.example.org"
RUN = "0f1e2d3c4b5a69788796a5b4c3d2e1ff"

# With a real cluster SkyPilot needs the real HOME; otherwise it gets one of its own to write its state to.
SLURM = os.environ.get("SLURM_TEST_CLUSTER", "")


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The SDK, with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if not SLURM:
            patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            patch.setenv("SKYPILOT_DISABLE_LOCAL_API_SERVER", "1")
        yield pytest.importorskip("sky")


def task_of(compute: Compute, out: Path, module: str = "ml.train") -> Task:
    """A task as the assets make it."""
    resources = Resources(compute.accelerators, compute.nodes, compute.price, compute.infra, compute.use_spot)
    arguments, processes = ("stage", "--out", str(out)), compute.ranks // compute.nodes
    return Task(
        "v2_0-paper/dit_stage1", module, arguments, out, resources, "headline", "v2_0-paper", processes=processes
    )


def accepted(sky: Any, launcher: SkyPilotLauncher, task: Task) -> dict[str, Any]:
    """What SkyPilot makes of our YAML."""
    document = yaml.safe_load(launcher.to_yaml(task, RUN, URI))
    config: dict[str, Any] = sky.Task.from_yaml_config(document).to_yaml_config()
    return config


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_paper_stages_are_understood(sky: Any, tmp_path: Path, name: str) -> None:
    compute = Recipe.load("v2_0", "paper").stage(name).compute
    config = accepted(sky, SkyPilotLauncher(), task_of(compute, tmp_path))
    assert config["num_nodes"] == compute.nodes
    assert config["resources"]["accelerators"] == {"H200": 8}
    assert config["resources"]["autostop"] == {"idle_minutes": 10, "down": True}
    assert TELEMETRY_OFF.items() <= config["envs"].items()
    assert "-m torch.distributed.run" in config["run"]
    assert "--nproc-per-node 8 --max-restarts 0" in config["run"]
    assert f"-m ml.train stage --out {tmp_path} --run-id {RUN} --tracking-uri {URI}" in config["run"]
    assert "environments/train.txt" in config["setup"]


def test_tiny_stages_ask_for_cores_and_one_process(sky: Any, tmp_path: Path, tiny_recipe: Recipe) -> None:
    for stage in tiny_recipe.stages:
        config = accepted(sky, SkyPilotLauncher(idle_minutes=5), task_of(stage.compute, tmp_path))
        assert config["resources"]["cpus"] == "2+"
        assert "accelerators" not in config["resources"]
        assert config["resources"]["autostop"]["idle_minutes"] == 5
        assert "torch.distributed.run" not in config["run"]


def test_infra_spot_and_mounts_arrive(sky: Any, tmp_path: Path) -> None:
    wanted = Compute(accelerators="H100:8", nodes=2, price="h100-spot-2026", infra="slurm/hpc/gpu", use_spot=True)
    config = SkyPilotLauncher(mounts={"/workspace": "s3://films/workspace"}).config(task_of(wanted, tmp_path), RUN, URI)
    assert config["file_mounts"] == {"/workspace": {"source": "s3://films/workspace", "mode": "MOUNT_CACHED"}}
    config = accepted(sky, SkyPilotLauncher(), task_of(wanted, tmp_path))
    assert (config["resources"]["infra"], config["resources"]["use_spot"]) == ("slurm/hpc/gpu", True)


def test_the_command_is_valid_shell_and_quotes_what_it_is_given(tmp_path: Path) -> None:
    compute = Compute(accelerators="H200:8", nodes=2, price="h200-od-2026")
    task = task_of(compute, tmp_path / "a folder; touch owned")
    config = SkyPilotLauncher().config(task, RUN, URI)
    for script in (config["run"], config["setup"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    shown = config["run"].replace("exec .venv-train/bin/python", "printf '%s\\n'")
    environment = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    done = subprocess.run(["bash", "-c", shown], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--master-addr") + 1] == "10.0.0.1"
    assert words[words.index("--node-rank") + 1] == "1"
    assert words[words.index("--out") + 1] == str(task.out)


def test_no_secret_stands_in_the_file_but_the_task_has_it(
    sky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    launcher = SkyPilotLauncher()
    task = task_of(Compute(accelerators="CPU:2", nodes=1, price="cpu-assume-2026"), tmp_path)
    assert "correct horse" not in launcher.to_yaml(task, RUN, URI)
    assert "correct horse" not in repr(launcher)
    held = launcher._sky_task(sky, launcher.config(task, RUN, URI))
    assert held.secrets["MLFLOW_TRACKING_PASSWORD"].get_secret_value() == "correct horse"


@pytest.mark.parametrize(
    ("uri", "said"),
    [("sqlite:////tmp/mlflow.db", "start an MLflow server"), ("https://me:pw@host", "MLFLOW_TRACKING_PASSWORD")],
)
def test_a_tracking_store_that_will_not_do_is_refused(tmp_path: Path, uri: str, said: str) -> None:
    task = task_of(Compute(accelerators="CPU:2", nodes=1, price="cpu-assume-2026"), tmp_path)
    with pytest.raises(ComputeError, match=said) as error:
        SkyPilotLauncher().config(task, RUN, uri)
    assert "pw" not in str(error.value)


def test_accelerators_that_the_price_is_not_about_are_refused(tmp_path: Path) -> None:
    task = task_of(Compute(accelerators="H2000:8", nodes=1, price="h200-od-2026"), tmp_path)
    with pytest.raises(
        ComputeError, match="'H2000:8' would be billed by price row 'h200-od-2026', which is about H200"
    ):
        SkyPilotLauncher().config(task, RUN, URI)


def test_a_place_that_skypilot_does_not_know_is_refused_in_its_words(sky: Any, tmp_path: Path) -> None:
    compute = Compute(accelerators="H200:8", nodes=1, price="h200-od-2026", infra="slurmm/hpc")
    launcher, task = SkyPilotLauncher(), task_of(compute, tmp_path)
    with pytest.raises(ComputeError, match="slurmm/hpc"):
        launcher._sky_task(sky, launcher.config(task, RUN, URI))


def test_every_status_of_this_skypilot_has_a_meaning(sky: Any) -> None:
    import sky.jobs

    names = {status.name for status in sky.JobStatus}
    names |= {status.name.removeprefix("DEPRECATED_") for status in sky.jobs.ManagedJobStatus}
    assert names == set(STATUSES)
    for status in (*sky.JobStatus, *sky.jobs.ManagedJobStatus):
        running = STATUSES[status.name.removeprefix("DEPRECATED_")] == "running"
        assert running != status.is_terminal(), f"{status} against SkyPilot's own is_terminal"
    assert [name for name, meaning in STATUSES.items() if meaning == "succeeded"] == ["SUCCEEDED"]


def test_a_cluster_is_named_after_its_run(sky: Any) -> None:
    from sky.utils import common_utils

    assert cluster_name(RUN) == cluster_name(RUN) != cluster_name(RUN[::-1])
    common_utils.check_cluster_name_is_valid(cluster_name(RUN))


class Stub:
    """Stands in for the API server, which only a real cluster has answers for: `answers` by name of the call."""

    JobStatus = SimpleNamespace

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[str] = []
        self.jobs = self

    def get(self, request: Any) -> Any:
        """The answer to a request, or its error."""
        answer = self.answers.get(request, request) if isinstance(request, str) else request
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return self.answers.get(name)

        return call


def polled(monkeypatch: pytest.MonkeyPatch, stub: Stub, data: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Status and tail that a poll gives against a stub."""
    monkeypatch.setattr("infra.compute.skypilot._sky", lambda: stub)
    known = {"cluster": "c", "run_id": RUN, "managed": False, "started": 1.0, "out": "/nowhere", "request": "r"}
    state = SkyPilotLauncher().poll(Handle("skypilot", {**known, **(data or {})}))
    return state.status, state.tail


def test_a_launch_under_way_is_running_and_a_failed_one_says_why(sky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sky import exceptions

    under_way = Stub(api_status=[SimpleNamespace(status="RUNNING")])
    assert polled(monkeypatch, under_way) == ("running", "")
    assert "queue" not in under_way.calls, "a cluster that is not up has no queue to ask"
    failed = Stub(api_status=[SimpleNamespace(status="FAILED")], r=exceptions.ResourcesUnavailableError("no H200 left"))
    assert polled(monkeypatch, failed) == ("failed", "launch failed: no H200 left")


def test_a_cluster_that_is_gone_is_lost_and_one_that_was_taken_preempted(
    sky: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sky import exceptions

    launched = [SimpleNamespace(status="SUCCEEDED")]
    gone = Stub(queue=exceptions.ClusterDoesNotExist("gone"), api_status=launched)
    assert polled(monkeypatch, gone)[0] == "lost"
    assert polled(monkeypatch, Stub(queue=[], api_status=launched))[0] == "lost"
    taken = Stub(queue=exceptions.ClusterNotUpError("down", cluster_status=None), api_status=launched)
    assert polled(monkeypatch, taken)[0] == "preempted"


def test_a_job_is_read_from_the_queue(sky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"job_id": 1, "status": sky.JobStatus.SUCCEEDED, "end_at": 2.0}
    done = Stub(queue=[old, {"job_id": 2, "status": sky.JobStatus.FAILED, "end_at": 5.0}])
    assert polled(monkeypatch, done) == ("failed", "SkyPilot: FAILED")
    setup = Stub(queue=[{"job_id": 1, "status": sky.JobStatus.SETTING_UP, "end_at": None}])
    assert polled(monkeypatch, setup)[0] == "running"


def test_a_managed_job_in_recovery_is_running(sky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sky.jobs

    for status, meaning in (("RECOVERING", "running"), ("SUCCEEDED", "succeeded"), ("FAILED_CONTROLLER", "lost")):
        row = SimpleNamespace(job_name="c", status=sky.jobs.ManagedJobStatus[status], end_at=3.0)
        other = SimpleNamespace(job_name="c2", status=sky.jobs.ManagedJobStatus.FAILED, end_at=3.0)
        stub = Stub(queue_v2=([other, row], 2, {}, 2))
        assert polled(monkeypatch, stub, {"managed": True})[0] == meaning


def test_a_run_that_has_a_cluster_is_not_launched_again(
    sky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(Compute(accelerators="CPU:2", nodes=1, price="cpu-assume-2026"), tmp_path)
    for up, launches in (([SimpleNamespace(name="c")], 0), ([], 1)):
        stub = Stub(status=up, launch="request-1")
        stub.Task = sky.Task  # type: ignore[attr-defined]
        monkeypatch.setattr("infra.compute.skypilot._sky", lambda stub=stub: stub)
        handle = SkyPilotLauncher().submit(task, RUN, URI)
        assert stub.calls.count("launch") == launches
        assert handle.data["cluster"] == cluster_name(RUN)
        assert Handle.from_json(handle.to_json()) == handle


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_a_real_cluster_runs_a_task_and_reports_its_end(sky: Any, tmp_path: Path) -> None:
    """Two real launches on the cluster that SLURM_TEST_CLUSTER names (see the head of this file): five minutes."""
    if not SLURM:
        pytest.skip("SLURM_TEST_CLUSTER names no cluster")
    (tmp_path / "work").mkdir()
    toy = "import pathlib, sys\nprint('hello from the cluster')\nsys.exit(3 if sys.argv[1] == 'fail' else 0)\n"
    (tmp_path / "work" / "toy_task.py").write_text(toy, encoding="utf-8")
    launcher = SkyPilotLauncher(workdir=tmp_path / "work")
    resources = Resources("CPU:2", 1, "cpu-assume-2026", infra=f"slurm/{SLURM}")
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "infra.compute.skypilot.SETUP",
        "mkdir -p .venv-train/bin\nln -sf $(command -v python3) .venv-train/bin/python\n",
    )
    try:
        for word, status in (("finish", "succeeded"), ("fail", "failed")):
            out = tmp_path / word
            out.mkdir()
            task = Task("toy/live", "toy_task", (word,), out, resources, "data", "toy")
            handle = launcher.submit(task, f"{time.time_ns():x}", URI)
            try:
                while (state := launcher.poll(handle)).running:
                    time.sleep(5)
                assert state.status == status, state
                assert "hello from the cluster" in (out / "task.log").read_text()
                assert state.ended is not None
                assert state.started is not None
                assert state.started < state.ended
            finally:
                launcher.cancel(handle)
            assert launcher.poll(handle).status == "lost", "the cluster is down"
    finally:
        patch.undo()
