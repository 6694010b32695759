"""What can go wrong while training, done to real trainings through the real launcher and a real MLflow store.

Each ends as described, nothing is lost (the weights are those of a training that nothing happened to, bit for bit),
and the bill adds up. Every test starts processes that import torch: slow.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from safetensors import safe_open

from infra.compute.attempt import Attempts
from infra.compute.ending import Ending
from infra.compute.local import LocalLauncher
from infra.compute.task import Resources, Task, TaskFailed
from infra.ledger import Ledger
from infra.runs import RunRecord, Tag
from infra.settings import TELEMETRY_OFF
from infra.tracking import Tracker
from ml.batching.datasets import SUFFIXES
from ml.batching.shards import checksum, write_shard
from ml.manifest import LATENTS
from ml.recipe import Recipe
from ml.training import consumed
from ml.training.curves import read_log
from ml.training.watch import read_beats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
STEPS = 45
# Batches of an epoch: seven clips as images by three, and as five frames by two.
EPOCH = 3 + 4
# `ml.train` that makes no step beyond the one that the file `hold` in its folder says, unless it is asked to stop.
HELD = """
import sys, time
from ml import train
from ml.training.trainer import Trainer

def held(trainer, step, advance=Trainer._advance):
    while step > last(trainer.plan.out / "hold") and not trainer.aids.asked():
        trainer.watch.beat(step, "waiting for data")
        time.sleep(0.02)
    return advance(trainer, step)

def last(file):
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return 10**9

Trainer._advance = held
sys.exit(train.main())
"""
SHARD, SPOILED = "latents-00000.safetensors", "clip3/48x80/48x80/5"
MakeRecipe = Callable[..., Recipe]


@dataclass(frozen=True)
class Rig:
    """Trains stage 1 of the small recipe in folders below `root`."""

    root: Path
    tracker: Tracker
    latents: Path
    make_recipe: MakeRecipe

    def task(self, name: str, processes: int = 1, latents: Path | None = None, held_at: int = 0, **stage: Any) -> Task:
        """A training of two ranks, or one, which is held after a step."""
        compute = {"accelerators": "CPU:2", "nodes": 1, "price": "cpu-assume-2026", "processes": processes}
        recipe = self.make_recipe(stage={"steps": STEPS, "checkpoint_every": 5, "compute": compute, **stage})
        out = self.root / "stage1" / name
        out.mkdir(parents=True)
        hold(out, held_at)
        (out / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
        arguments = ["stage", "--recipe", str(out / "recipe.yaml"), "--workspace", str(self.root), "--out", str(out)]
        arguments += ["--input", f"latents={latents or self.latents}", "--option", "stage=stage1"]
        resources = Resources("CPU:2", 1, "cpu-assume-2026")
        task = Task("v2_0-mini/dit_stage1", "held_train", tuple(arguments), out, resources, "headline", "faults")
        return replace(task, processes=processes, retries=3, grace_seconds=60.0)

    def run(self, task: Task, sabotage: Callable[[Task], None] | None = None) -> list[RunRecord]:
        """Bring the task to its result while something is done to it; its attempts, oldest first."""
        errors = list[BaseException]()

        def work(done: Callable[[Task], None]) -> None:
            try:
                done(task)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, args=(sabotage or (lambda _: None),))
        thread.start()
        try:
            Attempts(LocalLauncher(), self.tracker, pause_seconds=0.2).run(task)
        finally:
            thread.join(timeout=60)
        assert not errors, errors
        return self.attempts(task)

    def attempts(self, task: Task) -> list[RunRecord]:
        """Attempts at a task, oldest first, whose costs are what the parent says and the ledger bills."""
        runs = self.tracker.runs(task.experiment)
        [parent] = [run for run in runs if run.tags.get(Tag.PARENT_OF) == task.key]
        children = [run for run in runs[::-1] if run.tags.get(Tag.PARENT) == parent.run_id]
        paid = sum(child.metrics["cost_usd"] for child in children)
        rows = Ledger(self.tracker).rows()
        assert parent.metrics["total_cost_usd"] == pytest.approx(paid)
        assert rows[rows["run_id"].isin([run.run_id for run in (parent, *children)])]["cost_usd"].sum() == (
            pytest.approx(paid)
        )
        assert parent.metrics["total_attempts"] == len(children)
        return children


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, make_recipe: MakeRecipe, latents: Path
) -> Iterator[Rig]:
    """One store for all tests; their tasks differ in their keys."""
    root = tmp_path_factory.mktemp("faults")
    shutil.copy(empty_store, root / "mlflow.db")
    (root / "modules").mkdir()
    (root / "modules" / "held_train.py").write_text(HELD, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root / "modules"), prepend=os.pathsep)
        yield Rig(root, Tracker(f"sqlite:///{root / 'mlflow.db'}"), latents, make_recipe)


@pytest.fixture(scope="module")
def straight(rig: Rig) -> Callable[[int], bytes]:
    """`straight(ranks)`: the weights of a training that nothing happened to, on so many ranks."""

    @cache
    def train(processes: int) -> bytes:
        rig.run(task := rig.task(f"straight{processes}", processes))
        return weights(task)

    return train


def weights(task: Task) -> bytes:
    return (task.out / "weights.safetensors").read_bytes()


def hold(out: Path, step: int) -> None:
    """Let a training go on to the end of a step, and no further; 0: as far as it likes."""
    if step:
        (out / "hold.partial").write_text(str(step), encoding="utf-8")
        (out / "hold.partial").replace(out / "hold")
    else:
        (out / "hold").unlink(missing_ok=True)


def wait_for(condition: Callable[[], Any], seconds: float = 150) -> Any:
    """What the condition gave when it held."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)
    return found


def steps_done(task: Task) -> int:
    return len(read_log(task.out / "loss.csv")) if (task.out / "loss.csv").is_file() else 0


def held_ranks(task: Task) -> list[psutil.Process]:
    """The processes that train, by rank, once all of them are held and the step is in the log."""
    step = int((task.out / "hold").read_text())
    wait_for(lambda: steps_done(task) == step)
    run_id = json.loads((task.out / "attempt.json").read_text())["run_id"]
    beats = wait_for(
        lambda: (
            len(found := read_beats(task.out, run_id)) == task.processes
            and all(beat.step == step + 1 for beat in found)
            and found
        )
    )
    return [psutil.Process(beat.pid) for beat in beats]


def check_whole(task: Task) -> None:
    """Every step is in the log once, and every batch in the ledger."""
    assert read_log(task.out / "loss.csv")["step"].tolist() == list(range(1, STEPS + 1))
    assert consumed.problems(consumed.read(task.out / "consumed"), STEPS, EPOCH) == []


def purposes(attempts: list[RunRecord]) -> list[str]:
    return [attempt.tags[Tag.PURPOSE] for attempt in attempts]


def test_kill_9_of_a_rank(rig: Rig, straight: Callable[[int], bytes]) -> None:
    def kill(task: Task) -> None:
        held_ranks(task)[1].kill()
        hold(task.out, 0)

    attempts = rig.run(task := rig.task("kill", 2, held_at=12), kill)
    assert purposes(attempts) == ["failed", "headline"]
    assert weights(task) == straight(2)
    check_whole(task)


def test_sigterm_saves_the_place_and_training_goes_on_from_it(rig: Rig, straight: Callable[[int], bytes]) -> None:
    def take_the_machine(task: Task) -> None:
        held_ranks(task)
        os.kill(json.loads((task.out / "attempt.json").read_text())["pid"], signal.SIGTERM)
        wait_for(lambda: "asked to stop (SIGTERM): saved step 13" in (task.out / "task.log").read_text())
        hold(task.out, 0)

    attempts = rig.run(task := rig.task("sigterm", 2, held_at=12), take_the_machine)
    assert purposes(attempts) == ["preempted", "headline"]
    ending = Ending.read(task.out, attempts[0].run_id)
    assert ending is None, "a finished attempt leaves no reason to have stopped"
    said = (task.out / "task.log").read_text()
    assert f"resumed at step 13 of {STEPS}" in said
    assert weights(task) == straight(2)
    check_whole(task)


def test_a_truncated_checkpoint_is_passed_over(rig: Rig, straight: Callable[[int], bytes]) -> None:
    def damage(task: Task) -> None:
        [process] = held_ranks(task)
        newest = task.out / "checkpoints" / "step-00000015"
        wait_for(newest.is_dir)
        [file] = newest.glob("masters-*")
        os.truncate(file, file.stat().st_size - 100)
        process.kill()
        hold(task.out, 0)

    attempts = rig.run(task := rig.task("truncated", held_at=17), damage)
    assert purposes(attempts) == ["failed", "headline"]
    assert "going back to the checkpoint before it" in (task.out / "task.log").read_text()
    assert weights(task) == straight(1)
    check_whole(task)


def test_a_full_disk_costs_a_checkpoint_and_no_training(rig: Rig, straight: Callable[[int], bytes]) -> None:
    """No file of the process may grow beyond 20 kB for a while: the log of losses fits, weights do not."""

    def fill(task: Task) -> None:
        [process] = held_ranks(task)
        before = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (20_000, before[1]))
        hold(task.out, 17)
        held_ranks(task)
        wait_for(lambda: "was not saved" in (task.out / "task.log").read_text())
        process.rlimit(psutil.RLIMIT_FSIZE, before)
        hold(task.out, 0)

    attempts = rig.run(task := rig.task("full", held_at=7), fill)
    assert purposes(attempts) == ["headline"]
    assert "training goes on, those before it stay" in (task.out / "task.log").read_text()
    assert weights(task) == straight(1)
    check_whole(task)


def test_a_damaged_latent_ends_training_with_its_name(rig: Rig, tmp_path: Path) -> None:
    copy = shutil.copytree(rig.latents, tmp_path / "latents")
    file = copy / SHARD
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    first = start + json.loads(data[8:start])[SPOILED]["data_offsets"][0]
    data[first] ^= 1
    file.write_bytes(data)
    task = rig.task("damaged", latents=copy)
    with pytest.raises(TaskFailed, match=rf"{SHARD}, {SPOILED}: the file is damaged") as error:
        rig.run(task)
    assert "rank 0, at step" in error.value.first_line
    assert purposes(rig.attempts(task)) == ["failed"], "it would come again: nobody tries"


def spoiled(latents: Path, folder: Path) -> Path:
    """Latents of which one clip's are not numbers, under a checksum that is right."""
    shutil.copytree(latents, folder)
    rows = LATENTS.read(folder)
    with safe_open(folder / SHARD, "pt") as tensors:
        names = {key: [f"{key}{end}" for end in SUFFIXES if f"{key}{end}" in tensors.keys()] for key in rows["key"]}  # noqa: SIM118
        entries = {key: {name: tensors.get_tensor(name) for name in own} for key, own in names.items()}
    entries[SPOILED][SPOILED] = torch.full_like(entries[SPOILED][SPOILED], torch.nan)
    write_shard(folder / SHARD, entries, "drawn")
    LATENTS.write(rows.assign(crc32=[checksum(entries[key].values()) for key in rows["key"]]), folder)
    return folder


def test_not_a_number_in_a_batch_is_passed_over(rig: Rig, tmp_path: Path) -> None:
    attempts = rig.run(task := rig.task("nan", latents=spoiled(rig.latents, tmp_path / "latents")))
    assert purposes(attempts) == ["headline"]
    rows = consumed.read(task.out / "consumed")
    unused = rows[~rows["used"]]
    assert len(unused) > 0
    assert all(SPOILED in ids for ids in unused["ids"])
    assert len(unused) == sum(SPOILED in ids for ids in rows["ids"])
    with safe_open(task.out / "weights.safetensors", "pt") as tensors:
        assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys())  # noqa: SIM118
    lost = pd.isna(read_log(task.out / "loss.csv")["loss"])
    assert lost.sum() == len(unused)


def test_what_goes_wrong_again_and_again_ends_training(rig: Rig, tmp_path: Path) -> None:
    folder, guard = spoiled(rig.latents, tmp_path / "latents"), {"patience": 1, "rollbacks": 1}
    with pytest.raises(TaskFailed, match=rf"TrainingDiverged: .*{SPOILED}.* guard\.rollbacks is 1"):
        rig.run(task := rig.task("diverged", latents=folder, guard=guard, checkpoint_every=1))
    assert purposes(rig.attempts(task)) == ["failed"]


def test_a_rank_that_hangs_is_named_and_training_goes_on(rig: Rig, straight: Callable[[int], bytes]) -> None:
    reasons = list[str]()

    def freeze(task: Task) -> None:
        stopped = held_ranks(task)[1]
        stopped.suspend()
        hold(task.out, 0)
        wait_for((task.out / "stopped.json").is_file)
        reasons.append(json.loads((task.out / "stopped.json").read_text())["reason"])
        stopped.resume()  # or torchrun would wait its half minute before it kills it

    attempts = rig.run(task := rig.task("hang", 2, held_at=12, survival={"hang_seconds": 15.0}), freeze)
    assert purposes(attempts) == ["failed", "headline"]
    assert reasons[0].startswith("rank 1 was ")
    assert "its process is stopped or gone" in reasons[0]
    assert weights(task) == straight(2)
    check_whole(task)


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server in a session of its own, so that all of its processes can be stopped."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    with (folder / "server.log").open("ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | TELEMETRY_OFF, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: answers(port))
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(420)
def test_an_mlflow_server_that_is_away_for_a_minute_misses_nothing(rig: Rig, tmp_path: Path, empty_store: Path) -> None:
    """Training makes steps 7 to 30 meanwhile, and says that its records wait."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = replace(rig, tracker=Tracker(f"http://127.0.0.1:{port}"))
    task, found = remote.task("server", held_at=6), list[RunRecord]()
    thread = threading.Thread(target=lambda: found.extend(remote.run(task)))
    with server(tmp_path, port):
        thread.start()
        held_ranks(task)
    away = time.monotonic()
    hold(task.out, 30)
    held_ranks(task)
    wait_for(lambda: "records wait and the task goes on" in (task.out / "task.log").read_text())
    assert [step for step in steps_sent(tmp_path, task) if step > 6] == []
    time.sleep(max(0.0, away + 60 - time.monotonic()))
    with server(tmp_path, port):
        hold(task.out, 0)
        thread.join(timeout=150)
    assert purposes(found) == ["headline"]
    assert steps_sent(tmp_path, task) == list(range(1, STEPS + 1))


def steps_sent(folder: Path, task: Task) -> list[int]:
    """The steps whose losses are in the server's store."""
    run_id = json.loads((task.out / "attempt.json").read_text())["run_id"]
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        rows = store.execute("select distinct step from metrics where run_uuid = ? and key = 'loss'", (run_id,))
        return sorted(step for (step,) in rows)
