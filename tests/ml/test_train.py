"""The training entry, run as the processes that a launcher starts."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.compute.task import PREEMPTED
from infra.tracking import RunLog
from ml.entry import Call
from ml.models.weights import CheckpointMismatch, read_card
from ml.recipe import Recipe
from ml.train import main, train_autoencoder, train_stage
from ml.training import consumed
from ml.training.curves import read_log

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def long(make_recipe: Callable[..., Recipe]) -> Recipe:
    """Forty steps, a checkpoint every three: long enough to be killed in the middle."""
    return make_recipe(stage={"steps": STEPS, "checkpoint_every": 3})


@contextmanager
def process(recipe: Recipe, latents: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m ml.train stage`, ended when the block is left."""
    (out.parent / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    command = [sys.executable, "-m", "ml.train", "stage", "--recipe", str(out.parent / "recipe.yaml")]
    command += ["--workspace", str(out.parent), "--out", str(out), "--input", f"latents={latents}"]
    command += ["--option", "stage=stage1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def wait_for(condition: Callable[[], bool], started: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        assert started.poll() is None, f"it ended with {started.returncode}: {started.stderr.read()}"
        time.sleep(0.02)


def finished(recipe: Recipe, latents: Path, out: Path) -> dict[str, Any]:
    """Run to the end, and the result."""
    with process(recipe, latents, out) as started:
        assert started.wait(timeout=200) == 0, started.stderr.read()
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_kill_9_loses_nothing(long: Recipe, latents: Path, tmp_path: Path) -> None:
    """Three processes import torch (slow): one trains to the end, one is killed between checkpoints, one resumes it."""
    straight = finished(long, latents, tmp_path / "straight")
    out = tmp_path / "killed"
    with process(long, latents, out) as started:
        wait_for((out / "checkpoints" / "step-00000009").is_dir, started)
        os.kill(started.pid, signal.SIGKILL)
        assert started.wait(timeout=20) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    resumed = finished(long, latents, out)
    assert (tmp_path / "straight" / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()
    assert straight["data_version"] == resumed["data_version"]
    logs = [read_log(folder / "loss.csv") for folder in (tmp_path / "straight", out)]
    assert logs[0]["loss"].tolist() == logs[1]["loss"].tolist()
    assert logs[1]["step"].tolist() == list(range(1, STEPS + 1))
    last = [folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (tmp_path / "straight", out)]
    files = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert [name.partition("-")[0] for name in files] == ["average", "masters", "moments", "random"]
    for name in files:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()
    ledgers = [consumed.read(folder / "consumed") for folder in (tmp_path / "straight", out)]
    assert ledgers[0].equals(ledgers[1])


@pytest.mark.slow
def test_a_preempted_process_saves_and_says_so(long: Recipe, latents: Path, tmp_path: Path) -> None:
    """Starts a process of its own to be sent SIGTERM (slow import of torch)."""
    out = tmp_path / "out"
    with process(long, latents, out) as started:
        wait_for(lambda: len(read_log(out / "loss.csv")) > 4, started)
        started.terminate()
        assert started.wait(timeout=60) == PREEMPTED
        assert "asked to stop (SIGTERM): saved step" in started.stderr.read()
    rows = read_log(out / "loss.csv")
    assert len(rows) < STEPS
    assert (out / "checkpoints" / f"step-{len(rows):08d}").is_dir()
    assert not (out / "result.json").exists()


def test_a_stage_leaves_weights_a_card_a_picture_and_numbers(
    make_call: Callable[..., Call], mini: Recipe, latents: Path
) -> None:
    call = make_call("stage", mini, inputs={"latents": latents}, stage="stage2")
    train_stage(call)
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert result["data"] == ["model.json", "weights.safetensors"]
    assert result["pictures"] == ["loss.png"]
    assert (call.out / "loss.png").stat().st_size > 5000
    named = {"loss_first", "loss_last", "steps", "examples", "tokens", "examples_per_second", "tokens_per_second"}
    assert named | {"num_parameters", "peak_memory_mb", "seconds"} <= set(result["metrics"])
    assert result["metrics"]["steps"] == 6
    assert result["facts"]["exported"] == "ema"
    # Seven clips in batches of three images and two videos: one is left over in each bucket.
    assert result["facts"]["tail_batches"] == {"48x80/48x80/1": 1, "48x80/48x80/5": 1}
    card = read_card(call.out)
    assert (card.kind, card.origin.recipe, card.origin.stage) == ("mmdit", mini.id, "stage2")
    assert result["facts"]["ledger_problems"] == []
    average = load_file(call.out / "checkpoints" / "step-00000006" / "average-00000-of-00001.safetensors")
    exported = load_file(call.out / "weights.safetensors")
    assert all((average[name] == tensor).all() for name, tensor in exported.items())


def test_a_stage_starts_from_the_weights_of_the_one_before(
    make_call: Callable[..., Call], make_recipe: Callable[..., Recipe], latents: Path
) -> None:
    """At a learning rate of (almost) nothing a stage gives back what it was given."""
    adam = {"lr": 1e-12, "eps": 1e-8, "betas": (0.9, 0.99), "weight_decay": 0.0, "warmup_steps": 0}
    first = make_call("stage", make_recipe(), out="one", inputs={"latents": latents}, stage="stage1")
    train_stage(first)
    inputs = {"latents": latents, "init": first.out}
    second = make_call("stage", make_recipe(stage={"optimizer": adam}), out="two", inputs=inputs, stage="stage2")
    train_stage(second)
    before, after = (load_file(call.out / "weights.safetensors") for call in (first, second))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
    fresh = make_call(
        "stage", make_recipe(stage={"optimizer": adam}), out="x", inputs={"latents": latents}, stage="stage2"
    )
    train_stage(fresh)
    untrained = load_file(fresh.out / "weights.safetensors")
    assert max(float((before[name] - untrained[name]).abs().max()) for name in before) > 1e-3


def test_weights_and_checkpoints_of_another_recipe_are_refused(
    make_call: Callable[..., Call], make_recipe: Callable[..., Recipe], latents: Path
) -> None:
    call = make_call("stage", make_recipe(), inputs={"latents": latents}, stage="stage1")
    train_stage(call)
    changed = make_recipe(stage={"steps": 8})
    with pytest.raises(CheckpointMismatch, match="belongs to v2_0-tiny/stage1"):
        train_stage(make_call("stage", changed, inputs={"latents": latents}, stage="stage1"))
    other = make_recipe().model_copy(update={"name": "v1_2"})
    inputs = {"latents": latents, "init": call.out}
    with pytest.raises(CheckpointMismatch, match="v1_2"):
        train_stage(make_call("stage", other, out="other", inputs=inputs, stage="stage2"))


def test_bf16_trains_and_exports_fp32(
    make_call: Callable[..., Call], make_recipe: Callable[..., Recipe], latents: Path
) -> None:
    engine = {"kind": "plain", "precision": "bf16", "grad_clip": 1.0, "accumulate": 2, "sequence_parallel": 1}
    recipe = make_recipe(stage={"engine": {**engine, "checkpoint_blocks": (1, 1)}})
    call = make_call("stage", recipe, inputs={"latents": latents}, stage="stage3")
    train_stage(call)
    assert {str(tensor.dtype) for tensor in load_file(call.out / "weights.safetensors").values()} == {"torch.float32"}
    assert (read_log(call.out / "loss.csv")["examples"] > 1).all()


def test_an_autoencoder_trains_measures_its_scale_and_goes_on(
    make_call: Callable[..., Call], make_recipe: Callable[..., Recipe], footage: Any
) -> None:
    call = make_call("autoencoder", make_recipe(), inputs={"dataset": footage.dataset}, stage="vae_stage1")
    call = Call(call.op, call.recipe, footage.workspace, call.out, call.inputs, call.options, call.log)
    train_autoencoder(call)
    card = read_card(call.out)
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert card.latent == result["facts"]["latent"]
    assert card.latent["scale"] > 0
    assert (card.kind, card.origin.stage) == ("hunyuan", "vae_stage1")
    assert result["metrics"]["steps"] == 4
    fixed = make_recipe(autoencoder={"latent": {"scale": 0.5}})
    inputs = {name: tuple(folders) for name, folders in call.inputs.items()} | {"init": (call.out,)}
    second = Call(call.op, fixed, footage.workspace, call.out.parent / "two", inputs, call.options, call.log)
    second.out.mkdir()
    train_autoencoder(second)
    assert read_card(second.out).latent == {"scale": 0.5, "mean": [], "std": []}


def test_two_stage_autoencoders_train_one_half_at_a_time(
    make_call: Callable[..., Call], make_generation: Callable[..., Recipe], footage: Any
) -> None:
    """1.2: the 2-D half first, then the temporal one while the other stands still, then both."""
    recipe = make_generation("v1_2", autoencoder_stage={"steps": 2})
    moved, before = [], None
    for stage in recipe.autoencoder.stages:
        inputs = {"dataset": footage.dataset} | ({"init": before} if before else {})
        call = make_call("autoencoder", recipe, out=stage.name, inputs=inputs, stage=stage.name)
        train_autoencoder(replace(call, workspace=footage.workspace))
        if before:
            one, two = (load_file(folder / "weights.safetensors") for folder in (before, call.out))
            assert one.keys() == two.keys()
            changed = {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
            # How latents are normalised is measured anew after every stage, and lies beside the weights as released.
            moved.append(changed - {"scale", "shift"})
        before = call.out
        card = read_card(call.out)
        assert len(card.latent["mean"]) == len(card.latent["std"]) == recipe.autoencoder.latent_channels
    assert [stage.part for stage in recipe.autoencoder.stages] == ["spatial", "temporal", "temporal", "all"]
    assert moved == [{"temporal_vae"}, {"temporal_vae"}, {"spatial_vae", "temporal_vae"}]


class Killed(RunLog):
    """A run that is killed right after the log of a step: no checkpoint of it is written."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def metrics(self, values: Any, step: int | None = None) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def test_masked_training_goes_on_exactly(
    make_call: Callable[..., Call], make_generation: Callable[..., Recipe], make_latents: Callable[[Recipe], Path]
) -> None:
    """1.1: masks, dropped texts, noise and steps are drawn again as they would have been; killed in step 5 of 6."""
    kinds = {"t2v": 0.3, "quarter_random": 0.4, "image_head": 0.3}
    recipe = make_generation("v1_1", stage={"conditions": kinds})
    inputs = {"latents": make_latents(recipe)}
    straight = make_call("stage", recipe, out="straight", inputs=inputs, stage="stage1")
    train_stage(straight)
    killed = make_call("stage", recipe, out="killed", inputs=inputs, stage="stage1")
    with pytest.raises(KeyboardInterrupt):
        train_stage(replace(killed, log=Killed(5)))
    assert sorted(path.name for path in (killed.out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    train_stage(killed)
    one, two = ((call.out / "weights.safetensors").read_bytes() for call in (straight, killed))
    assert one == two
    losses = [read_log(call.out / "loss.csv")["loss"].tolist() for call in (straight, killed)]
    assert losses[0] == losses[1]


def test_training_against_an_adversary_goes_on_exactly(
    make_call: Callable[..., Call], make_generation: Callable[..., Recipe], footage: Any
) -> None:
    """1.3's autoencoder: the discriminator and its moments come back from the checkpoint; killed in step 3 of 4."""
    adversarial = {"channels": 4, "layers": 2, "lr": 1e-3, "dropout": 0.2}
    loss = {"reconstruction": 1.0, "kl": 1e-6, "adversarial": adversarial}
    recipe = make_generation("v1_3", autoencoder_stage={"loss": loss, "part": "all"})
    name = recipe.autoencoder.stages[0].name
    straight, killed = (
        replace(
            make_call("autoencoder", recipe, out=out, inputs={"dataset": footage.dataset}, stage=name),
            workspace=footage.workspace,
        )
        for out in ("straight", "killed")
    )
    train_autoencoder(straight)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(replace(killed, log=Killed(3)))
    assert (killed.out / "checkpoints" / "step-00000002" / "objective" / "adversary.safetensors").is_file()
    train_autoencoder(killed)
    one, two = ((call.out / "weights.safetensors").read_bytes() for call in (straight, killed))
    assert one == two
    last = [call.out / "checkpoints" / "step-00000004" / "objective" for call in (straight, killed)]
    assert (last[0] / "adversary.safetensors").read_bytes() == (last[1] / "adversary.safetensors").read_bytes()
    card = read_card(killed.out)
    assert len(card.latent["std"]) == 16


def test_a_cosine_ends_at_nothing(
    make_call: Callable[..., Call], make_recipe: Callable[..., Recipe], latents: Path
) -> None:
    """The stage hands its own number of steps to its schedule."""
    adam = {"lr": 1e-2, "eps": 1e-8, "betas": (0.9, 0.99), "weight_decay": 0.0, "warmup_steps": 0, "schedule": "cosine"}
    call = make_call("stage", make_recipe(stage={"optimizer": adam}), inputs={"latents": latents}, stage="stage1")
    train_stage(call)
    wanted = [0.005 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert read_log(call.out / "loss.csv")["lr"].tolist() == pytest.approx(wanted)


def test_the_command_line_reaches_both(mini: Recipe, latents: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(mini.dump(), encoding="utf-8")
    arguments = ["stage", "--recipe", str(tmp_path / "recipe.yaml"), "--workspace", str(tmp_path)]
    arguments += ["--out", str(tmp_path / "out"), "--input", f"latents={latents}", "--option", "stage=stage1"]
    assert main(arguments) == 0
    assert (tmp_path / "out" / "result.json").is_file()
    with pytest.raises(SystemExit):
        main(["destroy", *arguments[1:]])


def leg(arguments: list[str], stop_after: int) -> int:
    """One call of the entry in every rank; asked to stop once the checkpoint of a step is there (0 = never)."""
    out = Path(arguments[arguments.index("--out") + 1])
    if stop_after and os.environ["RANK"] == "0":

        def ask() -> None:
            while not (out / "checkpoints" / f"step-{stop_after:08d}").is_dir():
                time.sleep(0.005)
            (out / "stop").touch()

        threading.Thread(target=ask, daemon=True).start()
    return main(arguments)


@pytest.mark.slow
def test_two_ranks_one_and_two_again_make_the_steps_of_one(
    make_recipe: Callable[..., Recipe], ranks: Callable[..., list[Any]], tmp_path: Path, latents: Path
) -> None:
    """`batches_per_step` says what a step is; the ledger of the whole journey has no gap and nothing twice."""
    stage = {"steps": 60, "checkpoint_every": 5, "keep_checkpoints": 1}
    engine = {"kind": "plain", "precision": "fp32", "grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1}
    engine |= {"checkpoint_blocks": (0, 0), "batches_per_step": 2}
    compute = {"accelerators": "CPU:1", "nodes": 1, "price": "cpu-assume-2026"}
    recipes = {
        n: make_recipe(stage={**stage, "engine": engine, "compute": {**compute, "processes": n}}) for n in (1, 2)
    }

    def arguments(count: int, out: Path) -> list[str]:
        file = tmp_path / f"recipe{count}.yaml"
        file.write_text(recipes[count].dump(), encoding="utf-8")
        base = ["stage", "--recipe", str(file), "--workspace", str(tmp_path), "--out", str(out)]
        return [*base, "--input", f"latents={latents}", "--option", "stage=stage1"]

    journey, straight = tmp_path / "journey", tmp_path / "straight"
    assert ranks(leg, arguments(2, journey), 5) == [PREEMPTED, PREEMPTED]
    first = len(read_log(journey / "loss.csv"))
    assert ranks(leg, arguments(1, journey), first // 5 * 5 + 10, count=1) == [PREEMPTED]
    second = len(read_log(journey / "loss.csv"))
    assert ranks(leg, arguments(2, journey), 0) == [0, 0]
    assert ranks(leg, arguments(1, straight), 0, count=1) == [0]
    assert 0 < first < second < 60
    rows = consumed.read(journey / "consumed")
    length = json.loads((journey / "result.json").read_text(encoding="utf-8"))["facts"]["epoch_batches"]
    assert consumed.problems(rows, 60, length) == []
    shared = rows[rows["data_rank"] == 1]["step"]
    assert set(shared) == {*range(1, first + 1), *range(second + 1, 61)}
    logs = [read_log(folder / "loss.csv") for folder in (journey, straight)]
    assert logs[0]["loss"].tolist() == pytest.approx(logs[1]["loss"].tolist(), rel=1e-4)
    assert logs[0]["examples"].tolist() == logs[1]["examples"].tolist()
