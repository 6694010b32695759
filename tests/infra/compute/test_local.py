"""The local launcher: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from infra.compute.local import LocalLauncher
from infra.compute.task import ComputeError, Handle, Task, TaskState

MakeTask = Callable[..., Task]
URI = "sqlite:///unused.db"


@pytest.fixture
def launcher() -> LocalLauncher:
    """A launcher that does not wait long for a task that will not stop."""
    return LocalLauncher(grace_seconds=1.0)


def ended(launcher: LocalLauncher, handle: Handle, seconds: float = 30) -> TaskState:
    """The state once it is no longer running."""
    deadline = time.monotonic() + seconds
    while (state := launcher.poll(handle)).running:
        assert time.monotonic() < deadline, "the task did not end"
        time.sleep(0.05)
    return state


def started(task: Task) -> None:
    """Wait until the task itself, not only its supervisor, runs."""
    deadline = time.monotonic() + 30
    while not (task.out / "starts").is_file():
        assert time.monotonic() < deadline, "the task did not start"
        time.sleep(0.02)


def child_of(handle: Handle) -> psutil.Process:
    """The task's own process, below its supervisor."""
    return psutil.Process(handle.data["pid"]).children()[0]


def test_a_task_runs_to_its_end_and_its_log_is_kept(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("say=hello", "finish")
    before = time.time()
    handle = launcher.submit(task, "run1", URI)
    state = ended(launcher, handle)
    assert (state.status, state.exit_code, state.tail) == ("succeeded", 0, "hello")
    assert state.started is not None
    assert state.ended is not None
    assert before <= state.started <= state.ended <= time.time()
    assert task.finished
    assert (task.out / "starts").read_text() == "run1\n"


def test_a_failure_keeps_its_exit_code_and_traceback(launcher: LocalLauncher, make_task: MakeTask) -> None:
    handle = launcher.submit(make_task("raise=no column"), "run1", URI)
    state = ended(launcher, handle)
    assert (state.status, state.exit_code) == ("failed", 1)
    assert state.tail.endswith("ValueError: no column")
    assert ended(launcher, launcher.submit(make_task("exit=7"), "run2", URI)).exit_code == 7


def test_the_tail_is_of_this_attempt_only(launcher: LocalLauncher, make_task: MakeTask) -> None:
    ended(launcher, launcher.submit(make_task("say=first"), "run1", URI))
    handle = launcher.submit(task := make_task("say=second"), "run2", URI)
    assert ended(launcher, handle).tail == "second"
    assert (task.out / "task.log").read_text() == "first\nsecond\n"


def test_a_task_has_its_own_session_and_reports_nothing_home(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("await=go")
    handle = launcher.submit(task, "run1", URI)
    started(task)
    child = child_of(handle)
    assert os.getsid(child.pid) == handle.data["pid"] != os.getsid(0)
    assert child.environ()["DO_NOT_TRACK"] == "1"
    launcher.cancel(handle)
    assert ended(launcher, handle).exit_code == -signal.SIGTERM
    launcher.cancel(handle)  # of a task that has ended: nothing happens


def test_a_task_that_ignores_sigterm_is_killed_after_the_grace(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("stubborn", "say=deaf", "await=go")
    handle = launcher.submit(task, "run1", URI)
    while launcher.log_tail(handle) != "deaf":
        time.sleep(0.02)
    launcher.cancel(handle)
    assert ended(launcher, handle).exit_code == -signal.SIGKILL


def test_a_task_can_be_cancelled_at_once_and_without_its_supervisor(
    launcher: LocalLauncher, make_task: MakeTask
) -> None:
    handle = launcher.submit(make_task("await=go"), "run1", URI)
    launcher.cancel(handle)
    assert not launcher.poll(handle).running
    orphaned = launcher.submit(task := make_task("await=go", key="orphaned"), "run2", URI)
    started(task)
    child = child_of(orphaned)
    os.kill(orphaned.data["pid"], signal.SIGKILL)
    launcher.cancel(orphaned)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_killed_task_leaves_its_signal(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("await=go")
    handle = launcher.submit(task, "run1", URI)
    started(task)
    child_of(handle).kill()
    state = ended(launcher, handle)
    assert (state.status, state.exit_code) == ("failed", -signal.SIGKILL)


def test_a_task_without_its_supervisor_is_stopped_and_lost(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("sleep=1.2", "await=go")
    handle = launcher.submit(task, "run1", URI)
    started(task)
    child = child_of(handle)
    time.sleep(1.3)  # past one beat, so that the last sign of life is not the first
    killed = time.time()
    os.kill(handle.data["pid"], signal.SIGKILL)
    state = ended(launcher, handle)
    assert (state.status, state.exit_code) == ("lost", None)
    assert state.ended is not None
    assert handle.data["started"] < state.ended <= killed
    assert killed - state.ended < 2.0, "the heart beats once a second"
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_one_folder_has_one_attempt(
    launcher: LocalLauncher, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("await=go")
    handle = launcher.submit(task, "run1", URI)
    started(task)
    with pytest.raises(ComputeError, match="locked by an attempt that still runs"):
        replace(launcher).submit(task, "run2", URI)
    (task.out / "go").touch()
    assert ended(launcher, handle).status == "succeeded"
    assert (task.out / "starts").read_text() == "run1\n"


def test_a_folder_stays_taken_while_an_orphan_lives(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("await=go")
    handle = launcher.submit(task, "run1", URI)
    started(task)
    os.kill(handle.data["pid"], signal.SIGKILL)
    with pytest.raises(ComputeError, match="locked"):
        launcher.submit(task, "run2", URI)
    assert launcher.poll(handle).status == "lost"  # which stops the orphan, so that another attempt may start
    (task.out / "go").touch()
    assert ended(launcher, launcher.submit(task, "run3", URI)).status == "succeeded"


def test_a_handle_is_found_again_from_the_folder(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("await=go", "finish")
    assert launcher.find(task, "run1", time.time()) is None
    launcher.submit(task, "run1", URI)
    started(task)
    found = launcher.find(task, "run1", time.time())
    assert found is not None
    assert launcher.poll(found).running
    assert launcher.find(task, "run2", time.time()) is None
    (task.out / "go").touch()
    assert ended(launcher, found).status == "succeeded"


def handle_of(launcher: LocalLauncher, task: Task, **changes: object) -> Handle:
    """The handle of a task that was started and has ended, with some of its facts changed."""
    handle = launcher.submit(task, "run1", URI)
    ended(launcher, handle)
    return Handle("local", {**handle.data, **changes})


def test_another_process_with_the_same_id_is_not_the_task(
    launcher: LocalLauncher, make_task: MakeTask, tmp_path: Path
) -> None:
    changes = {"pid": os.getpid(), "create_time": 1.0, "started": 1.0, "out": str(tmp_path), "run_id": "r"}
    assert launcher.poll(handle_of(launcher, make_task(), **changes)).status == "lost"


def test_after_a_restart_nothing_is_killed(launcher: LocalLauncher, make_task: MakeTask) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        changes = {"pid": bystander.pid, "boot": "an earlier life", "run_id": "r", "started": 1.0}
        handle = handle_of(launcher, make_task(), **changes)
        assert launcher.poll(handle).status == "lost"
        launcher.cancel(handle)
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=10)


def test_a_task_of_another_host_is_left_to_it(launcher: LocalLauncher, make_task: MakeTask, tmp_path: Path) -> None:
    unseen = handle_of(launcher, make_task(), host="elsewhere", out=str(tmp_path / "unseen"))
    with pytest.raises(ComputeError, match="works on host elsewhere"):
        launcher.poll(unseen)


def test_a_module_that_does_not_exist_fails_with_pythons_words(launcher: LocalLauncher, make_task: MakeTask) -> None:
    handle = launcher.submit(replace(make_task(), module="no.such.module"), "run1", URI)
    state = ended(launcher, handle)
    assert state.exit_code == 1
    assert "no.such" in state.tail


def test_the_record_of_an_end_is_whole(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("exit=3")
    ended(launcher, launcher.submit(task, "run1", URI))
    record = json.loads((task.out / "attempt.json").read_text())
    assert (record["run_id"], record["exit_code"]) == ("run1", 3)
    assert not list(task.out.glob("*.partial"))


def test_a_task_of_several_nodes_is_refused(launcher: LocalLauncher, make_task: MakeTask) -> None:
    task = make_task("pass")
    with pytest.raises(ComputeError, match="asks for 2 nodes, the local launcher has this machine"):
        launcher.submit(replace(task, resources=replace(task.resources, nodes=2)), "run", "sqlite:///x")


def test_the_handle_of_another_launcher_is_refused(launcher: LocalLauncher) -> None:
    with pytest.raises(ComputeError, match="skypilot"):
        launcher.poll(Handle("skypilot", {}))


RANK = """
import os, pathlib, signal, sys, time
out, rank, how = pathlib.Path(sys.argv[2]), os.environ["RANK"], sys.argv[3]
def save(*_):
    time.sleep(float(how))
    (out / f"saved-{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1 if how == "0" else signal.SIGTERM, save)
if rank == "1" and how == "raise":
    raise ValueError("no column")
(out / f"pid-{rank}").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.fixture
def two_ranks(make_task: MakeTask) -> Callable[[str], Task]:
    """Factory `two_ranks(how)`: two ranks that wait; `how` is what they do when asked to stop, or that one fails."""

    def make(how: str) -> Task:
        task = make_task(key=f"ranks{how}")
        (task.out.parents[2] / "rank_task.py").write_text(RANK, encoding="utf-8")
        arguments = ("--out", str(task.out), how)
        return replace(task, module="rank_task", arguments=arguments, processes=2, grace_seconds=30.0)

    return make


def ranks_of(task: Task) -> list[psutil.Process]:
    """The two processes, once they work."""
    files = [task.out / f"pid-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.is_file() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [psutil.Process(int(file.read_text())) for file in files]


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended; a zombie has."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_ranks_are_told_to_stay_on_loopback_and_a_user_may_say_otherwise(
    two_ranks: Callable[[str], Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, task = LocalLauncher(grace_seconds=1.0), two_ranks("1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    handle = launcher.submit(task, "run1", URI)
    try:
        for process in ranks_of(task):
            told = process.environ()
            assert told["GLOO_SOCKET_IFNAME"] == "lo"
            assert told["MASTER_ADDR"] == "127.0.0.1"
            assert told["TORCHELASTIC_USE_AGENT_STORE"] == "False"
            assert told["OMP_NUM_THREADS"] == "7"
    finally:
        launcher.cancel(handle)


def test_a_killed_rank_is_named(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    handle = launcher.submit(task := two_ranks("1"), "run1", URI)
    processes = ranks_of(task)
    processes[1].kill()
    state = ended(launcher, handle, 60)
    assert (state.status, state.exit_code) == ("failed", -signal.SIGKILL)
    assert state.reason == "rank 1 was killed by SIGKILL"
    assert all(map(gone, processes))


def test_a_rank_that_fails_by_itself_is_named_with_its_words_in_the_log(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    state = ended(launcher, launcher.submit(task := two_ranks("raise"), "run1", URI), 60)
    assert (state.status, state.exit_code, state.reason) == ("failed", 1, "rank 1 ended first, with exit code 1")
    assert "ValueError: no column" in (task.out / "task.log").read_text()


def test_ranks_have_the_whole_grace_to_save_their_place(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    handle = launcher.submit(task := two_ranks("10"), "run1", URI)
    ranks_of(task)
    launcher.cancel(handle)
    assert not launcher.poll(handle).running
    assert sorted(file.name for file in task.out.glob("saved-*")) == ["saved-0", "saved-1"]


def test_ranks_that_know_of_no_stop_end_by_the_signal(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    handle = launcher.submit(task := two_ranks("0"), "run1", URI)
    ranks_of(task)
    launcher.cancel(handle)
    state = launcher.poll(handle)
    assert (state.status, state.exit_code) == ("failed", -signal.SIGTERM), "as a single process would"
    assert state.reason == "torchrun was stopped by SIGTERM, and no rank saved its place"


def test_slurms_notice_reaches_every_rank(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    handle = launcher.submit(task := two_ranks("0"), "run1", URI)
    ranks_of(task)
    os.kill(handle.data["pid"], signal.SIGUSR1)
    ended(launcher, handle, 60)
    assert sorted(file.name for file in task.out.glob("saved-*")) == ["saved-0", "saved-1"]


def test_ranks_do_not_outlive_a_supervisor_and_a_torchrun_that_were_killed(two_ranks: Callable[[str], Task]) -> None:
    launcher = LocalLauncher()
    handle = launcher.submit(task := two_ranks("1"), "run1", URI)
    processes = ranks_of(task)
    torchrun = child_of(handle)
    os.kill(handle.data["pid"], signal.SIGKILL)
    torchrun.kill()
    assert ended(launcher, handle).status == "lost"
    assert all(map(gone, processes))
