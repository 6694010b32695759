"""One training step of the transformer: where noise is added, the network is asked, and the loss goes backward.

`take_step` is the same for every objective; `Denoising` is that of every generation: the process (`ml/diffusion`) says
how noise is added and what is learned of it, and which frames the network is given. Letters: B batch, C latent
channels, t h w latent grid (the time of the process is `times`), S text tokens, P pooled width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ml.architectures import Model
from ml.batching.datasets import LatentBatch
from ml.counts import block_flops
from ml.diffusion.draws import Conditioner, Draw, Ends
from ml.diffusion.process import Process, Shape
from ml.engines.protocol import Engine
from ml.models.inputs import Denoiser, Inputs, Text, denoise
from ml.shapes import Size, Strides
from ml.training.exits import short_of_memory

Data = TypeVar("Data", contravariant=True)


@dataclass(frozen=True)
class Loss:
    """The mean loss of a batch (to go backward from), how much data it came from, and its terms, for the log.

    `flops` are the model FLOPs of forward and backward (`ml.counts`), 0 where nobody counts them.
    """

    value: Tensor
    examples: int
    tokens: int
    terms: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0


@dataclass(frozen=True)
class StepReport:
    """What a step did on all ranks: mean loss over its micro-batches, gradient norm before clipping, data consumed.

    `terms` are this rank's. `updated` is False when a loss or the gradient was not finite, and nothing was learned;
    `asked` is True when any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    examples: int
    tokens: int
    terms: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    updated: bool = True
    asked: bool = False


class Objective(Protocol[Data]):
    """What turns a batch into a loss; the only thing in which training the autoencoder and the transformer differ.

    Most keep nothing between steps; one that does (a discriminator) overrides the three last methods.
    """

    def loss(self, engine: Engine, data: Data, generator: torch.Generator) -> Loss:
        """The loss of one micro-batch; every random number comes from `generator`."""
        ...

    def begin(self, step: int) -> None:
        """A step starts; steps count from 1."""
        return

    def save(self, folder: Path) -> None:
        """Write what is kept between steps into a folder."""
        return

    def load(self, folder: Path) -> None:
        """Take it back."""
        return


def take_step(
    engine: Engine,
    objective: Objective[Data],
    micro_batches: Sequence[Data],
    generators: Sequence[torch.Generator],
    asked: Callable[[], bool] = lambda: False,
) -> StepReport:
    """Forward and backward of every micro-batch, each with the generator of its own random numbers; then one update.

    `asked` says whether this rank was asked to stop; the report says whether any was, so that all stop at the same
    step. Raises NoMemory, which names the micro-batch that did not fit.
    """
    losses = []
    for index, (data, generator) in enumerate(zip(micro_batches, generators, strict=True)):
        # Whatever draws from torch's global generator is as repeatable as what draws from ours.
        torch.manual_seed(generator.initial_seed())
        with short_of_memory(index), engine.accumulate(last=index == len(micro_batches) - 1):
            loss = objective.loss(engine, data, generator)
            engine.backward(loss.value / len(micro_batches))
        losses.append(loss)
    mean = _mean([float(loss.value.detach()) for loss in losses])
    summed = [sum(getattr(loss, name) for loss in losses) for name in ("examples", "tokens", "flops")]
    whole, examples, tokens, flops, stops = engine.total([mean, *summed, float(asked())])
    # Ranks that share a batch each counted it.
    sharing = engine.size // engine.data_size
    finite = math.isfinite(whole)
    if not finite:
        engine.discard()
    with short_of_memory(None):
        grad_norm = engine.step() if finite else math.nan
    names = {name for one in losses for name in one.terms}
    return StepReport(
        loss=whole / engine.size,
        grad_norm=grad_norm,
        examples=round(examples / sharing),
        tokens=round(tokens / sharing),
        terms={name: _mean([one.terms[name] for one in losses if name in one.terms]) for name in sorted(names)},
        flops=flops / sharing,
        updated=math.isfinite(grad_norm),
        asked=stops > 0,
    )


@dataclass(frozen=True)
class Dropping:
    """How often a text is dropped, each encoder's output by itself, and the empty prompt that then stands for it.

    `null` is a batch of one; a network that holds a null caption of its own (1.x) has its context there, and then a
    dropped prompt keeps its mask, as it does at sampling time.
    """

    context: float
    pooled: float
    null: Text
    keeps_mask: bool

    def apply(self, text: Text, generator: torch.Generator, always: Tensor | None = None) -> Text:
        """The texts with some of them dropped; `always` [B] bool names examples that lose theirs in any case."""
        draws = torch.rand(2, len(text.pooled), generator=generator, device=generator.device).cpu()
        context, pooled = draws[0] < self.context, draws[1] < self.pooled
        if always is not None:
            context, pooled = context | always.cpu(), pooled | always.cpu()
        mask = text.mask if self.keeps_mask else torch.where(context[:, None], self.null.mask, text.mask)
        return Text(
            torch.where(context[:, None, None], self.null.context, text.context),
            torch.where(pooled[:, None], self.null.pooled, text.pooled),
            mask,
        )


@dataclass(frozen=True)
class Geometry:
    """What a batch costs: the strides that make tokens of pixels, and the network whose work is counted."""

    strides: Strides
    model: Model

    def train_flops(self, data: LatentBatch) -> float:
        """Model FLOPs of forward and backward over one example of a batch; a backward pass counts as two forwards."""
        frames, height, width = data.latents.shape[2:]
        return 3.0 * block_flops(self.model, (frames, height, width), data.text.context.shape[1])


class Denoising(Objective[LatentBatch]):
    """A batch of latents is noised and the network says what it should of it; given frames and dropped texts drawn."""

    def __init__(
        self, process: Process, network: Denoiser, conditioner: Conditioner, dropping: Dropping, geometry: Geometry
    ) -> None:
        self.process, self.network, self.conditioner = process, network, conditioner
        self.dropping, self.geometry = dropping, geometry

    def loss(self, engine: Engine, data: LatentBatch, generator: torch.Generator) -> Loss:
        """Mean loss over a batch of latents [B,C,t,h,w]."""
        latents = data.latents.to(engine.device, non_blocking=True)
        shape = shape_of(data, self.geometry.strides)
        times = self.process.draw(len(latents), shape, generator)
        noise = torch.randn(latents.shape, generator=generator, device=engine.device)
        drawn = self.conditioner.draw(
            latents, generator, Ends(*(_moved(end, engine) for end in (data.heads, data.tails)))
        )
        text = self.dropping.apply(data.text, generator, drawn.drop_text)
        inputs = inputs_of(data, text.to(engine.device, engine.dtype), drawn, engine)
        shown = latents if data.damaged is None else data.damaged.to(engine.device, non_blocking=True)
        noisy = self.process.noisy(shown, noise, times, inputs.active).to(engine.dtype)
        output = denoise(engine.model, self.network, noisy, self.process.network_time(times), inputs)
        value = self.process.losses(output.float(), latents, noise, times, drawn.weights).mean()
        tokens, flops = shape.tokens_per_frame * shape.latent_frames, self.geometry.train_flops(data)
        return Loss(value, len(latents), len(latents) * tokens, flops=len(latents) * flops)


def shape_of(data: LatentBatch, strides: Strides) -> Shape:
    """What a batch is in pixels, frames and tokens."""
    size = data.cell.size
    frames = data.latents.shape[2]
    return Shape(data.cell.frames, size.height, size.width, frames, tokens_per_frame(size, strides))


def tokens_per_frame(size: Size, strides: Strides) -> int:
    """Tokens of one latent frame."""
    return strides.tokens(size, 1)


def inputs_of(data: LatentBatch, text: Text, drawn: Draw, engine: Engine) -> Inputs:
    """What the network is told of a batch, on the engine's device."""
    device, size = engine.device, data.cell.size
    return Inputs(
        text=text,
        height=size.height,
        width=size.width,
        frames=data.cell.frames,
        fps=data.fps.to(device),
        condition=None if drawn.condition is None else drawn.condition.to(device, engine.dtype),
        active=drawn.active,
        given=drawn.given,
    )


def _moved(tensor: Tensor | None, engine: Engine) -> Tensor | None:
    return None if tensor is None else tensor.to(engine.device, non_blocking=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
