"""A look at training: what it says, and that training does not notice it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from infra.tracking import RunLog
from ml.batching.datasets import DatasetError, LatentDataset, batch_sizes
from ml.batching.sampler import BucketSampler
from ml.batching.stream import BatchStream
from ml.batching.video import Frames
from ml.engines.make import make_engine
from ml.models.networks import Network
from ml.recipe import Recipe
from ml.training.ema import EMA
from ml.training.held_out import Asked, held_out_loss
from ml.training.networks import new_transformer
from ml.training.objective import denoising
from ml.training.optim import adamw, schedule, step_generator
from ml.training.step import take_step
from ml.training.validation import Exam, Validator, add_row, averaged, exchange

SECTION = {"every": 2, "clips": 3, "timesteps": 2, "sampling_steps": 2, "prompts": ("dark", "bright")}


class Shades:
    """A preview that shows what it is given: a shade for every prompt, and draws from the global generator."""

    prompts = ("dark", "bright")

    def __call__(self, asked: Asked, prompt: str) -> Frames:
        assert not asked.model.training
        torch.rand(3)
        return np.full((7, 16, 32, 3), 40 if prompt == "dark" else 220, np.uint8)


class Kept(RunLog):
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, dict[str, float]] = {}
        self.pictures: list[Path] = []

    def metrics(self, values: Any, step: int = 0) -> None:
        self.numbers[step] = dict(values)

    def picture(self, path: Path) -> None:
        self.pictures.append(path)


@dataclass
class Run:
    """An engine in training, its network and its average."""

    engine: Any
    network: Network
    ema: EMA | None


def started(recipe: Recipe) -> Run:
    stage = recipe.stage("stage1")
    engine, network = make_engine(stage.engine, stage.compute), new_transformer(recipe)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    return Run(engine, network, EMA(engine.masters(), 0.9))


def trained(recipe: Recipe, folder: Path, steps: int, look: Callable[[int, Run], None] | None) -> dict[str, Tensor]:
    """Masters and average after some steps; noise comes from torch's global generator too."""
    run, data = started(recipe), LatentDataset(folder)
    stage = recipe.stage("stage1")
    groups = data.groups("train", stage.name)
    order = BucketSampler(groups, batch_sizes(groups, stage), 3, run.engine.data_rank, run.engine.data_size)
    objective = denoising(recipe, stage, run.network, data.null)
    torch.manual_seed(1)
    with BatchStream(order, data.of_batch) as stream:
        for step in range(1, steps + 1):
            batch, latents = stream.next()
            generator = step_generator(run.engine.device, 7, 0, batch.position.index)
            take_step(run.engine, objective, [latents], [generator])
            assert run.ema is not None
            run.ema.update(run.engine.masters())
            if look is not None:
                look(step, run)
    assert run.engine.model.training
    average = {f"ema.{name}": tensor for name, tensor in run.ema.shards.items()} if run.ema else {}
    masters = {name: tensor.detach().clone() for name, tensor in run.engine.masters().items()}
    return {**masters, **average, "random": torch.rand(4)}


def validator(recipe: Recipe, folder: Path, out: Path, preview: Any = None) -> tuple[Validator, Kept]:
    log = Kept()
    exam = Exam.of(recipe, recipe.stage("stage1"), LatentDataset(folder), preview)
    network = new_transformer(recipe)
    return Validator(network, 2, exam, out, log), log


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    """The small recipe, with a look every second step."""
    return make_recipe(stage={"validation": SECTION})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bit_for_bit_the_same_when_it_is_looked_at(
    make_recipe: Callable[..., Recipe], recipe: Recipe, latents: Path, tmp_path: Path, precision: str
) -> None:
    engine = {**recipe.stage("stage1").engine.model_dump(), "precision": precision}
    own = make_recipe(stage={"validation": SECTION, "engine": engine})
    looks, log = validator(own, latents, tmp_path, Shades())

    def look(step: int, run: Run) -> None:
        looks.network = run.network
        looks(step, run)

    alone, seen = trained(own, latents, 5, None), trained(own, latents, 5, look)
    assert sorted(log.numbers) == [2, 4]
    assert alone.keys() == seen.keys()
    assert all(torch.equal(alone[name], seen[name]) for name in alone)


def test_what_is_measured_is_the_average_on_clips_of_this_stage(recipe: Recipe, latents: Path, tmp_path: Path) -> None:
    run, data = started(recipe), LatentDataset(latents)
    assert run.ema is not None
    draws = torch.Generator().manual_seed(2)
    for tensor in run.ema.shards.values():
        tensor.add_(torch.randn(tensor.shape, generator=draws), alpha=0.2)
    looks, log = validator(recipe, latents, tmp_path, Shades())
    looks.network = run.network
    looks(2, run)
    other = new_transformer(recipe).eval()
    own = held_out_loss(other, data, looks.exam.grid, torch.device("cpu"))
    other.load_state_dict({**other.state_dict(), **run.ema.shards})
    wanted = held_out_loss(other, data, looks.exam.grid, torch.device("cpu"))
    numbers = log.numbers[2]
    assert numbers["val_loss"] == pytest.approx(wanted.mean, rel=1e-6)
    assert numbers["val_loss"] != pytest.approx(own.mean, rel=1e-3)
    assert [numbers["val_loss/t0.25"], numbers["val_loss/t0.75"]] == pytest.approx(wanted.by_timestep, rel=1e-6)
    buckets = {f"val_loss/{name}": loss for name, loss in wanted.by_bucket.items()}
    assert {name: numbers[name] for name in buckets} == pytest.approx(buckets, rel=1e-6)
    assert set(buckets) == {"val_loss/48x80/48x80/1", "val_loss/48x80/48x80/5"}
    assert pd.read_csv(tmp_path / "validation.csv").to_dict("records") == [{"step": 2, **numbers}]


def test_samples_are_shown_on_one_sheet_in_the_order_of_prompts(recipe: Recipe, latents: Path, tmp_path: Path) -> None:
    run = started(recipe)
    looks, log = validator(recipe, latents, tmp_path, Shades())
    looks.network = run.network
    looks(1, run)
    assert not log.pictures, "it is not time yet"
    looks(40, run)
    assert log.pictures == [tmp_path / "validation" / "step-00000040.png"]
    with Image.open(log.pictures[0]) as picture:
        shades = np.asarray(picture.convert("L"))[:, 20]
    assert (shades == 40).sum() == (shades == 220).sum() == 96
    assert np.flatnonzero(shades == 40).max() < np.flatnonzero(shades == 220).min()


def test_weights_come_back_when_looking_fails(recipe: Recipe) -> None:
    run = started(recipe)
    assert run.ema is not None
    for tensor in run.ema.shards.values():
        tensor.add_(1.0)
    before = {name: tensor.detach().clone() for name, tensor in run.engine.masters().items()}
    with pytest.raises(OSError, match="disk"), averaged(run.engine, run.ema):  # noqa: PT012
        assert all(torch.equal(tensor, before[name] + 1) for name, tensor in run.engine.masters().items())
        raise OSError("disk")
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.engine.masters().items())


def test_exchange_swaps_every_bit() -> None:
    one, other = {"a": torch.tensor([0.1, -0.0])}, {"a": torch.tensor([float("nan"), 3e-45])}
    bits = [tensors["a"].view(torch.int32).clone() for tensors in (one, other)]
    exchange(one, other)
    assert torch.equal(one["a"].view(torch.int32), bits[1])
    assert torch.equal(other["a"].view(torch.int32), bits[0])


def test_rows_of_a_killed_attempt_are_taken_out(tmp_path: Path) -> None:
    for step in (10, 20, 30, 20):
        add_row(tmp_path / "validation.csv", {"step": step, "val_loss": step / 3})
    rows = pd.read_csv(tmp_path / "validation.csv")
    assert rows["step"].tolist() == [10, 20]
    assert rows["val_loss"].tolist() == [10 / 3, 20 / 3]


def test_a_look_that_was_cut_off_is_made_on_resume_and_no_other(recipe: Recipe, latents: Path, tmp_path: Path) -> None:
    run = started(recipe)
    looks, log = validator(recipe, latents, tmp_path)
    looks.network = run.network
    looks.resumed(3, run)
    assert not log.numbers, "it was not time yet"
    looks.resumed(2, run)
    assert sorted(log.numbers) == [2]
    first = (tmp_path / "validation.csv").read_bytes()
    looks.resumed(2, run)
    looks.resumed(4, run)
    assert sorted(log.numbers) == [2, 4]
    assert (tmp_path / "validation.csv").read_bytes().startswith(first)


def test_a_stage_without_held_out_clips_is_refused(recipe: Recipe, latents: Path) -> None:
    data = LatentDataset(latents)
    data.rows = data.rows[data.rows["split"] == "train"]
    with pytest.raises(DatasetError, match="no holdout latents for stage1"):
        Exam.of(recipe, recipe.stage("stage1"), data, None)


def _look_together(recipe: Recipe, folder: str, out: str) -> tuple[dict[int, dict[str, float]], bool]:
    torch.manual_seed(0)
    run = started(recipe)
    looks, log = validator(recipe, Path(folder), Path(out), Shades())
    looks.network = run.network
    looks(2, run)
    run.engine.close()
    return log.numbers, bool(log.pictures)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_ranks_say_what_one_says(
    make_recipe: Callable[..., Recipe], ranks: Any, latents: Path, tmp_path: Path, sharding: str
) -> None:
    """Five parts (3 clips at two lengths, batches of 3 and 2) for two ranks: the last rank repeats one for nothing."""
    one = make_recipe(stage={"validation": SECTION})
    stage = one.stage("stage1")
    shared = {
        "validation": SECTION,
        "engine": {**stage.engine.model_dump(), "sharding": sharding},
        "compute": {**stage.compute.model_dump(), "processes": 2},
    }
    two = make_recipe(stage=shared)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone, _ = _look_together(one, str(latents), str(tmp_path / "one"))
    main, other = ranks(_look_together, two, str(latents), str(tmp_path / "two"))
    assert main[0][2] == pytest.approx(alone[2], rel=1e-5)
    assert main[1]
    assert other == ({}, False), "the main rank alone writes"
    one_picture, two_picture = (tmp_path / name / "validation" / "step-00000002.png" for name in ("one", "two"))
    assert one_picture.read_bytes() == two_picture.read_bytes()
