"""Tasks, handles and states."""

from dataclasses import replace
from pathlib import Path

import pytest

from infra.compute.task import ComputeError, Handle, Resources, Task, TaskState, last_lines


def test_devices_are_counted_over_all_nodes() -> None:
    resources = Resources("H200:8", 28, "h200-hist-2025q1")
    assert (resources.kind, resources.per_node, resources.devices, resources.on_cpu) == ("H200", 8, 224, False)
    assert Resources("CPU:2", 1, "cpu-assume-2026").on_cpu


@pytest.mark.parametrize("accelerators", ["H200", "8:H200", "H200:0", "h200:8", "H200:x", ""])
def test_accelerators_that_are_no_name_and_count_are_refused(accelerators: str) -> None:
    with pytest.raises(ComputeError, match="NAME:COUNT; write `CPU:2` or `H200:8`"):
        Resources(accelerators, 1, "h200-hist-2025q1")


def test_a_task_on_no_node_is_refused() -> None:
    with pytest.raises(ComputeError, match="at least one"):
        Resources("CPU:2", 0, "cpu-assume-2026")


def test_a_handle_survives_json() -> None:
    handle = Handle("local", {"pid": 7, "started": 1.5, "out": "/a b/ü"})
    assert Handle.from_json(handle.to_json()) == handle
    assert "\n" not in handle.to_json()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"launcher": "local"}', '{"launcher": "local", "data": 3}'])
def test_a_damaged_handle_is_called_one(text: str) -> None:
    with pytest.raises(ComputeError, match="not a task handle"):
        Handle.from_json(text)


def test_a_command_logs_to_its_run(tmp_path: Path) -> None:
    resources = Resources("CPU:2", 1, "cpu-assume-2026")
    task = Task("a/b", "ml.curate", ("shots", "--out", "x"), tmp_path / "key", resources, "data", "exp")
    command = task.command("python", "r1", "sqlite:///x")
    assert command[:4] == ("python", "-m", "ml.curate", "shots")
    assert command[-4:] == ("--run-id", "r1", "--tracking-uri", "sqlite:///x")
    assert task.key == "key"
    assert not task.finished


def test_several_processes_are_ranks_of_torchrun(tmp_path: Path) -> None:
    resources = Resources("CPU:2", 1, "cpu-assume-2026")
    task = Task("a/b", "ml.train", ("stage",), tmp_path / "key", resources, "headline", "exp", processes=2)
    command = task.command("python", "r1", "sqlite:///x")
    assert command[:5] == ("python", "-m", "torch.distributed.run", "--nnodes", "1")
    assert command[command.index("--nproc-per-node") + 1] == "2"
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"
    assert command[command.index("--rdzv-conf") + 1] == "store_type=file", "a TCP store listens on every network"
    assert command[command.index("--max-restarts") + 1] == "0"
    assert command[-7:] == ("-m", "ml.train", "stage", "--run-id", "r1", "--tracking-uri", "sqlite:///x")
    assert int(command[command.index("--shutdown-timeout") + 1]) < task.grace_seconds
    with pytest.raises(ComputeError, match="at least one on each node"):
        replace(task, processes=0)


def test_a_state_has_one_of_five_words() -> None:
    assert TaskState("running").running
    with pytest.raises(ComputeError, match="finished"):
        TaskState("finished")  # type: ignore[arg-type]


def test_last_lines_are_the_last() -> None:
    assert last_lines("a\nb\nc\n\n", 2) == "b\nc"
