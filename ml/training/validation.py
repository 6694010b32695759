"""A look at training while it runs: the loss on held-out clips, and sampled videos, every so many steps.

Both are of the weights that would be exported (the moving average, if there is one), and training goes on as if nobody
had looked: same weights, same modes, same random numbers. Under several ranks all of them look together.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from torch import Tensor, nn

from infra.storage import atomic_write
from infra.tracking import RunLog
from ml.batching.datasets import LatentDataset, batch_sizes
from ml.batching.video import Frames
from ml.diffusion.process import build_process
from ml.engines.protocol import Engine
from ml.models.inputs import Denoiser
from ml.pictures import Strip, sheet, spread
from ml.recipe import Recipe
from ml.sections import Stage
from ml.training.ema import EMA
from ml.training.held_out import Asked, Grid, HeldOut, chosen_clips, even_times, measure
from ml.training.record import best_effort

SHEET_FRAMES = 6


class Preview(Protocol):
    """Samples videos of prompts with a network as it stands (`ml/sampling/preview.py`)."""

    prompts: tuple[str, ...]

    def __call__(self, asked: Asked, prompt: str) -> Frames:
        """A video [T,H,W,3] uint8."""
        ...


class Training(Protocol):
    """What is looked at: an engine, and its moving average if there is one."""

    engine: Engine
    ema: EMA | None


@dataclass(frozen=True)
class Exam:
    """What a network is asked: held-out latents on a grid of times, and videos where there is a preview."""

    latents: LatentDataset
    grid: Grid
    preview: Preview | None = None

    @classmethod
    def of(cls, recipe: Recipe, stage: Stage, latents: LatentDataset, preview: Preview | None) -> "Exam":
        """The exam that a stage's validation section sets; DatasetError where no held-out clip is in its buckets."""
        section = stage.validation
        if section is None:
            raise ValueError(f"stage {stage.name} has no validation section")
        keys = chosen_clips(latents.groups("holdout", stage.name), section.clips, recipe.seed)
        told = recipe.sampling.guidance_text if recipe.model.kind == "mmdit" and recipe.model.guidance_embed else None
        times, process = even_times(section.timesteps), build_process(recipe.objective)
        return cls(latents, Grid(keys, times, recipe.seed, process, told, batch_sizes(keys, stage)), preview)


class Validator:
    """Holds an exam every so many steps; writes `validation.csv` and `validation/step-00000040.png`, logs both."""

    def __init__(self, network: Denoiser, every: int, exam: Exam, out: Path, log: RunLog) -> None:
        self.network, self.every, self.exam, self.out, self.log = network, every, exam, out, log
        self._table = out / "validation.csv"

    def __call__(self, step: int, training: Training) -> None:
        """Look, if it is time to. Together."""
        if step % self.every:
            return
        engine = training.engine
        with undisturbed(engine), averaged(engine, training.ema):
            asked = Asked.of(engine, self.network)
            found = measure(asked, self.exam.latents, self.exam.grid)
            strips = self._strips(asked, engine) if self.exam.preview else []
        if engine.is_main:
            with best_effort(self._table):
                self._note(step, found)
                self._show(step, strips)

    def resumed(self, step: int, training: Training) -> None:
        """Look at the step that training goes on from, if it stopped there before it had looked. Together."""
        seen = self._table.is_file() and step in set(pd.read_csv(self._table)["step"])
        if not training.engine.collect(seen)[0]:
            self(step, training)

    def _strips(self, asked: Asked, engine: Engine) -> list[Strip]:
        """A row of frames for every prompt, from whichever rank sampled it."""
        assert self.exam.preview is not None
        preview, own = self.exam.preview, {}
        for prompt, counted in asked.shares(preview.prompts):
            frames = preview(asked, prompt)
            if counted:
                own[prompt] = spread(frames, SHEET_FRAMES)
        made: dict[str, Frames] = {}
        for part in engine.collect(own):
            made |= part
        return [Strip(prompt, [made[prompt]]) for prompt in preview.prompts]

    def _note(self, step: int, found: HeldOut) -> None:
        numbers = by_name(found, self.exam.grid.times)
        add_row(self._table, {"step": step, **numbers})
        self.log.metrics(numbers, step=step)

    def _show(self, step: int, strips: list[Strip]) -> None:
        if not strips:
            return
        folder = self.out / "validation"
        folder.mkdir(exist_ok=True)
        self.log.picture(sheet(strips, folder / f"step-{step:08d}.png", title=f"step {step}"))


def by_name(found: HeldOut, times: tuple[float, ...]) -> dict[str, float]:
    """Held-out losses as metrics: `val_loss`, `val_loss/t0.10` by time, `val_loss/256px/256x256/17` by bucket."""
    timed = {f"val_loss/t{time:.2f}": loss for time, loss in zip(times, found.by_timestep, strict=True)}
    return {"val_loss": found.mean, **timed, **{f"val_loss/{name}": loss for name, loss in found.by_bucket.items()}}


def add_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a table of steps; rows of its step and later, which a killed attempt left, are taken out."""
    rows = pd.DataFrame([row])
    if path.is_file():
        before = pd.read_csv(path)
        rows = pd.concat([before[before["step"] < row["step"]], rows], ignore_index=True)
    atomic_write(path, rows.to_csv(index=False))


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Modules in evaluation mode, gradients off; modes and random numbers come back as they were."""
    modes = [(module, module.training) for module in engine.model.modules()]
    cuda = [torch.cuda.current_device()] if engine.device.type == "cuda" else []
    engine.model.eval()
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            yield
    finally:
        _restore(modes)


@contextmanager
def averaged(engine: Engine, ema: EMA | None) -> Iterator[None]:
    """The moving average in place of the weights, which come back bit for bit. Together."""
    if ema is None:
        yield
        return
    exchange(engine.masters(), ema.shards)
    engine.publish()
    try:
        yield
    finally:
        exchange(engine.masters(), ema.shards)
        engine.publish()


@torch.no_grad()
def exchange(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Swap the values of tensors of the same names, one at a time, so that no second copy of them is held."""
    for name, tensor in one.items():
        kept = tensor.detach().clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
