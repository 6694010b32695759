"""The largest batch of every bucket that a device holds: found by real steps on a GPU, else predicted.

A step is tried as training makes it (forward, backward, with the optimizer's state and the moving average there) on
latents of the bucket's shape; what they hold does not matter. Letters: B batch, C latent channels, t h w latent grid.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ml import memory
from ml.batching.buckets import Cell
from ml.batching.datasets import LatentBatch
from ml.engines.make import make_engine
from ml.engines.protocol import Engine
from ml.models.inputs import Text
from ml.processes import RectifiedFlow
from ml.recipe import Recipe
from ml.sections import Stage
from ml.shapes import sizes_of
from ml.training.ema import EMA
from ml.training.exits import is_oom
from ml.training.levers import prepare
from ml.training.lora import add_lora
from ml.training.networks import new_transformer
from ml.training.objective import denoising
from ml.training.optim import adamw, schedule
from ml.training.step import Objective

# Above this the search stops: no bucket of any recipe comes near.
MOST = 4096

Taken = Callable[[Cell, int], float]
Sizes = dict[str, dict[int, int]]


class BatchSearchError(RuntimeError):
    """The search for the largest batches did not come to its end."""


@dataclass(frozen=True)
class Found:
    """Largest batches by resolution and frames, as a recipe's `buckets` name them; 0 = not even one example fits."""

    how: Literal["measured", "predicted"]
    sizes: Sizes


def batch_sizes_apart(recipe: Recipe, stage: Stage, space: float | None = None) -> Found:
    """`batch_sizes` in a process of its own, which gives all memory back when it ends.

    Raises BatchSearchError when that process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(batch_sizes, recipe, stage, space).result()
        except BrokenProcessPool as error:
            raise BatchSearchError(
                f"{stage.name}: the process that tried batches was killed, for lack of memory most often: look for it "
                "in the machine's log, or leave --batch-sizes out"
            ) from error


def batch_sizes(recipe: Recipe, stage: Stage, space: float | None = None) -> Found:
    """The largest batches of a stage in `space` bytes a rank (None = what its device has).

    Measured where this machine is the one GPU that the stage asks for, else predicted (`ml/memory.py`): what a rank
    holds of a stage that is spread over several cannot be tried on one. Either way what the estimate sets aside for
    CUDA and for encoders is left free.
    """
    room = memory.available(stage.compute) if space is None else space
    if stage.compute.on_cpu or stage.compute.ranks > 1 or not torch.cuda.is_available():
        sizes: Sizes = {}
        for resolution, frames in memory.cells(stage):
            largest_one = memory.largest_batch(recipe, stage, (resolution, frames), room)
            sizes.setdefault(resolution, {})[frames] = largest_one
        return Found("predicted", sizes)
    _, estimate = memory.worst(recipe, stage)
    step = RealStep.of(recipe, stage)
    try:
        return Found("measured", search(recipe, stage, step, room - estimate.overhead - estimate.encoders))
    finally:
        step.engine.close()


def search(recipe: Recipe, stage: Stage, taken: Taken, room: float) -> Sizes:
    """The largest batch of every bucket for which `taken` is at most `room` bytes; starts from the recipe's batches."""
    found: Sizes = {}
    for resolution, frames in memory.cells(stage):
        cell = largest_cell(recipe, resolution, frames)
        start = stage.buckets[resolution][frames].batch
        found.setdefault(resolution, {})[frames] = largest(
            lambda count, cell=cell: taken(cell, count) <= room,  # type: ignore[misc]
            start,
        )
    return found


def largest(fits: Callable[[int], bool], start: int = 1, most: int = MOST) -> int:
    """The largest count up to `most` that fits, where every smaller one fits too; 0 when not even 1 does.

    Doubles from `start` until it does not fit, then halves what is left between.
    """
    low, high, count = 0, most + 1, min(max(1, start), most)
    while low < count < high:
        if fits(count):
            low, count = count, min(2 * count, most)
        else:
            high = count
    while high - low > 1 and low < most:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class RealStep:
    """Bytes that a real step takes at its widest moment; infinite when it runs out of memory."""

    def __init__(self, recipe: Recipe, engine: Engine, objective: Objective[LatentBatch], ema: EMA | None) -> None:
        self.recipe, self.engine, self.objective, self.ema = recipe, engine, objective, ema
        self._warm = False

    @classmethod
    def of(cls, recipe: Recipe, stage: Stage) -> "RealStep":
        """The step of a stage, on a network of its own."""
        engine, network = make_engine(stage.engine, stage.compute), new_transformer(recipe)
        prepare(network, stage.engine)
        if stage.lora is not None:
            add_lora(network, stage.lora, recipe.seed)
        engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
        objective = denoising(recipe, stage, network, blank_text(recipe, 1))
        return cls(recipe, engine, objective, EMA(engine.masters(), 0.0) if stage.ema_decay is not None else None)

    def __call__(self, cell: Cell, count: int) -> float:
        """Try so many examples of a bucket."""
        generator = torch.Generator(self.engine.device).manual_seed(0)
        try:
            with measured(self.engine) as taken, self.engine.accumulate(last=True):
                loss = self.objective.loss(self.engine, blank_batch(self.recipe, cell, count), generator)
                self.engine.backward(loss.value)
                del loss
                if not self._warm:
                    # The optimizer makes its state in its first update.
                    self.engine.step()
                    self._warm = True
            return taken()
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            return inf
        finally:
            self.engine.discard()
            if self.engine.device.type == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def measured(engine: Engine) -> Iterator[Callable[[], float]]:
    """A callable that says how many bytes were taken: on a GPU at the peak, elsewhere by what the backward pass kept.

    The latter counts every storage once and leaves out the network's own weights.
    """
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
        yield lambda: float(torch.cuda.max_memory_allocated(engine.device))
        return
    own = {weight.untyped_storage().data_ptr() for weight in engine.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: float(sum(kept.values()))


def largest_cell(recipe: Recipe, resolution: str, frames: int) -> Cell:
    """A bucket at that of its aspect ratios which has the most pixels."""
    sizes = sizes_of(resolution, recipe.strides.pixels).values()
    return Cell(resolution, frames, max(sizes, key=lambda size: size.area))


def blank_batch(recipe: Recipe, cell: Cell, count: int) -> LatentBatch:
    """Latents [B,C,t,h,w] of a bucket's shape that hold nothing, with all that the recipe's network is told of."""
    stride, frames = recipe.autoencoder.spatial_stride, recipe.strides.latent_frames(cell.frames)
    grid = (cell.size.height // stride, cell.size.width // stride)
    latents = torch.zeros(count, recipe.autoencoder.latent_channels, frames, *grid)
    ends = recipe.model.conditioning in ("channels", "embed") and cell.frames > 1
    objective = recipe.objective
    damaged = isinstance(objective, RectifiedFlow) and objective.augmentation is not None
    return LatentBatch(
        latents,
        blank_text(recipe, count),
        torch.full((count,), float(recipe.sampling.fps)),
        cell,
        heads=latents[:, :, :1].clone() if ends else None,
        tails=latents[:, :, -1:].clone() if ends else None,
        damaged=latents.clone() if damaged else None,
    )


def blank_text(recipe: Recipe, count: int) -> Text:
    """Texts of full length that say nothing."""
    text = recipe.text
    mask = torch.ones(count, text.max_tokens, dtype=torch.bool)
    return Text(torch.zeros(count, text.max_tokens, text.context_dim), torch.zeros(count, text.pooled_dim), mask)
