"""The house's own training step on synthetic latents, timed: engine, objective, optimizer and stream are those of
`ml.train`, only what they are given is drawn.
"""

import gc
import os
import resource
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ml.architectures import MMDiT as MMDiTSection
from ml.architectures import Model
from ml.batching.buckets import Cell
from ml.batching.datasets import LatentBatch
from ml.batching.sampler import Batch, BucketSampler
from ml.batching.stream import BatchStream
from ml.counts import block_flops
from ml.diffusion.draws import Conditioner
from ml.diffusion.process import build_process
from ml.engines.make import make_engine
from ml.methods import Engine
from ml.models.inputs import Text
from ml.models.networks import build_network
from ml.plan import PEAK_TFLOPS
from ml.recipe import Recipe
from ml.sections import Adam, Compute
from ml.shapes import sizes_of
from ml.training.levers import prepare
from ml.training.objective import null_text
from ml.training.optim import adamw, schedule, step_generator
from ml.training.step import Denoising, Dropping, Geometry, StepReport, take_step

ADAM = Adam(lr=1e-4, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=0)
CLIPS, SEED = 64, 0


@dataclass(frozen=True)
class Case:
    """What is trained: so many blocks of each kind of a recipe's network, of so many heads, on clips of one shape.

    None = as many as the recipe says. A head keeps its size, so heads are the width.
    """

    recipe: Recipe
    resolution: str
    frames: int
    batch: int = 1
    blocks: tuple[int, int] | None = None
    heads: int | None = None

    @cached_property
    def network(self) -> Model:
        """The section of the slice."""
        whole = self.recipe.network
        heads = self.heads or whole.num_heads
        sizes: dict[str, Any] = {"num_heads": heads, "hidden_size": whole.hidden_size // whole.num_heads * heads}
        if self.blocks:
            sizes["depth"] = self.blocks[0]
            sizes |= {"depth_single_blocks": self.blocks[1]} if isinstance(whole, MMDiTSection) else {}
        return type(whole).model_validate({**whole.model_dump(), **sizes})

    @property
    def cell(self) -> Cell:
        """The bucket: the largest shape of the resolution."""
        sizes = sizes_of(self.resolution, self.recipe.strides.pixels).values()
        return Cell(self.resolution, self.frames, max(sizes, key=lambda size: size.area))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent grid (t, h, w)."""
        return self.recipe.strides.grid(self.cell.size, self.frames)

    @property
    def tokens(self) -> int:
        """Visual tokens of a clip."""
        return self.recipe.strides.tokens(self.cell.size, self.frames)

    @property
    def scale(self) -> float:
        """How many times the slice's FLOPs the whole network has."""
        given = (self.grid, self.recipe.text.max_tokens)
        return block_flops(self.recipe.network, *given) / block_flops(self.network, *given)

    def load(self, batch: Batch) -> LatentBatch:
        """Latents and text of a batch, drawn by its place in the stream."""
        generator = step_generator(torch.device("cpu"), SEED, batch.position.epoch, batch.position.index)
        text, channels = self.recipe.text, self.recipe.autoencoder.latent_channels
        count = len(batch.ids)
        drawn = Text(
            torch.randn(count, text.max_tokens, text.context_dim, generator=generator),
            torch.randn(count, text.pooled_dim, generator=generator),
            torch.ones(count, text.max_tokens, dtype=torch.bool),
        )
        latents = torch.randn(count, channels, *self.grid, generator=generator)
        return LatentBatch(latents, drawn, torch.full((count,), 24.0), batch.cell)

    def stream(self, rank: int = 0, size: int = 1) -> BatchStream[LatentBatch]:
        """Batches of the one shape."""
        groups = {self.cell: [f"clip{index}" for index in range(CLIPS * self.batch)]}
        return BatchStream(
            BucketSampler(groups, {self.cell: self.batch}, SEED, rank, size), self.load, pin=torch.cuda.is_available()
        )


@dataclass(frozen=True)
class Measured:
    """A row: seconds of a step; visual tokens and model TFLOP of it on one rank; peak bytes; share of waiting."""

    seconds: float
    tokens: float
    tflop: float
    peak_bytes: int
    waited: float
    losses: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of one rank."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of one rank."""
        return self.tflop / self.seconds

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs over the peak of the data sheet; None where there is none."""
        peak = PEAK_TFLOPS.get(accelerator())
        return self.tflops / peak if peak and torch.cuda.is_available() else None


class RealStep:
    """Calling it takes one training step; use it as a context manager, which gives back what it holds."""

    def __init__(self, case: Case, section: Engine) -> None:
        self.case = case
        self.engine = make_engine(section, here())
        torch.manual_seed(SEED)
        with self.engine.device:
            self.network = build_network(case.network)
            stir(self.network)
        prepare(self.network, section)
        self.engine.setup(self.network, adamw(ADAM), schedule(ADAM, 1))
        recipe, text = case.recipe, case.recipe.text
        empty = Text(
            torch.zeros(1, text.max_tokens, text.context_dim),
            torch.zeros(1, text.pooled_dim),
            torch.ones(1, text.max_tokens, dtype=torch.bool),
        )
        self.process = build_process(recipe.objective)
        conditioner = Conditioner(recipe.model.conditioning, {"t2v": 1.0}, recipe.objective)
        dropping = Dropping(0.0, 0.0, *null_text(self.network, empty))
        geometry = Geometry(recipe.strides, case.network)
        self.objective = Denoising(self.process, self.network, conditioner, dropping, geometry)
        self.stream = case.stream(self.engine.data_rank, self.engine.data_size)

    def __enter__(self) -> "RealStep":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.engine.close()

    def __call__(self) -> StepReport:
        """One step on the next batch of the stream."""
        batch, data = self.stream.next()
        generator = step_generator(self.engine.device, SEED, batch.position.epoch, batch.position.index)
        return take_step(self.engine, self.objective, [data], [generator])


def measure(case: Case, section: Engine, steps: int, warm_up: int = 3, attention: SDPBackend | None = None) -> Measured:
    """Time `steps` steps after a warm-up; `attention` forces one of torch's kernels, None lets the house choose."""
    forced: AbstractContextManager[Any] = nullcontext() if attention is None else sdpa_kernel(attention)
    try:
        with forced, RealStep(case, section) as step:
            for _ in range(warm_up):
                step()
            waited, begun = step.stream.waited, _now()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            reports = [step() for _ in range(steps)]
            seconds, ranks = _now() - begun, step.engine.size
            waiting = (step.stream.waited - waited) / seconds
        last = reports[-1]
        losses = tuple(report.loss for report in reports)
        return Measured(seconds / steps, last.tokens / ranks, last.flops / ranks / 1e12, _peak_bytes(), waiting, losses)
    finally:
        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def section_of(over: Mapping[str, Any]) -> Engine:
    """The plain engine, in bf16 on a GPU, with a section's keys laid over."""
    base: dict[str, Any] = {
        "kind": "plain",
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "grad_clip": 1.0,
    }
    base |= {"accumulate": 1, "sequence_parallel": 1, "checkpoint_blocks": (0, 0)}
    return Engine.model_validate({**base, **over})


def here() -> Compute:
    """This machine; under torchrun, its ranks are one node's."""
    # torchrun's own variable; without it there is one process.
    ranks = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1
    if torch.cuda.is_available():
        return Compute(accelerators=f"{accelerator()}:{ranks}", nodes=1, price="none")
    return Compute(accelerators=f"CPU:{torch.get_num_threads() * ranks}", nodes=1, price="none", processes=ranks)


def accelerator() -> str:
    """The name of a data sheet, as of `PEAK_TFLOPS`: H100, H200, ...; GPU for others, CPU without."""
    if not torch.cuda.is_available():
        return "CPU"
    name = torch.cuda.get_device_name()
    return next((known for known in PEAK_TFLOPS if known in name), "GPU")


def stir(network: nn.Module) -> None:
    """Draw what a fresh network starts at zero, lest half of it has no gradient."""
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    """Peak of the steps on a GPU; on a CPU that of the whole process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
