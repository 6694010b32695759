"""One training step of the transformer: where noise is added, the velocity is asked for, and the loss goes backward.

`take_step` is the same for every objective; `FlowMatching` is Open-Sora 2.0's. Letters: B batch, C latent channels,
t h w latent grid (the time of the flow is `times`), S text tokens, D width, P pooled width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ml.batching.datasets import LatentBatch
from ml.diffusion import conditions, rectified_flow, timesteps
from ml.diffusion.conditions import Kind
from ml.diffusion.guidance import Text
from ml.engines.protocol import Engine
from ml.sections import RectifiedFlow

Data = TypeVar("Data", contravariant=True)


@dataclass(frozen=True)
class Loss:
    """The mean loss of a batch (to go backward from), and how much data it came from."""

    value: Tensor
    examples: int
    tokens: int


@dataclass(frozen=True)
class StepReport:
    """What a step did: mean loss over its micro-batches, gradient norm before clipping, data it consumed."""

    loss: float
    grad_norm: float
    examples: int
    tokens: int


class Objective(Protocol[Data]):
    """What turns a batch into a loss; the only thing in which training the autoencoder and the transformer differ."""

    def loss(self, engine: Engine, data: Data, generator: torch.Generator) -> Loss:
        """The loss of one micro-batch; every random number comes from `generator`."""
        ...


def take_step(
    engine: Engine, objective: Objective[Data], micro_batches: Sequence[Data], generator: torch.Generator
) -> StepReport:
    """Forward and backward of every micro-batch, then one update."""
    losses = []
    for index, data in enumerate(micro_batches):
        with engine.accumulate(last=index == len(micro_batches) - 1):
            loss = objective.loss(engine, data, generator)
            engine.backward(loss.value / len(micro_batches))
        losses.append(loss)
    grad_norm = engine.step()
    return StepReport(
        loss=sum(float(loss.value.detach()) for loss in losses) / len(losses),
        grad_norm=grad_norm,
        examples=sum(loss.examples for loss in losses),
        tokens=sum(loss.tokens for loss in losses),
    )


class FlowMatching:
    """Rectified flow of Open-Sora 2.0: logit-normal times, shifted by size, text dropped per encoder, given frames.

    `kinds` are the condition kinds with their weights, `patch` the transformer's, `null` the embedded empty prompt
    (context [S,D], pooled [P]) that stands for a dropped text.
    """

    def __init__(self, section: RectifiedFlow, kinds: Mapping[Kind, int], patch: int, null: Text) -> None:
        self.section, self.kinds, self.patch, self.null = section, kinds, patch, null

    def loss(self, engine: Engine, data: LatentBatch, generator: torch.Generator) -> Loss:
        """Mean squared error of the velocity over all latents [B,C,t,h,w], given ones included (2.0's default)."""
        latents = data.latents.to(engine.device)
        tokens_per_frame = latents.shape[3] * latents.shape[4] // self.patch**2
        by = timesteps.alpha(self.section.shift, tokens_per_frame, latents.shape[2])
        times = timesteps.draw(self.section, len(latents), by, generator)
        noise = torch.randn(latents.shape, generator=generator, device=engine.device)
        noisy = rectified_flow.interpolate(latents, noise, times, self.section.sigma_min)
        text = self._drop(data.text, generator)
        given = self._condition(data, generator)
        velocity = engine.model(
            noisy.to(engine.dtype),
            times,
            text.context.to(engine.device, engine.dtype),
            text.pooled.to(engine.device, engine.dtype),
            None if given is None else given.to(engine.device, engine.dtype),
        )
        wanted = rectified_flow.target(latents, noise, self.section.sigma_min)
        value = rectified_flow.loss(velocity, wanted).mean()
        return Loss(value, len(latents), len(latents) * tokens_per_frame * latents.shape[2])

    def _drop(self, text: Text, generator: torch.Generator) -> Text:
        """Each encoder's output is replaced by the empty prompt's with its own probability, sample by sample."""
        draws = torch.rand(2, len(text.pooled), generator=generator, device=generator.device).cpu()
        drop_context, drop_pooled = draws[0] < self.section.drop_context, draws[1] < self.section.drop_pooled
        return Text(
            torch.where(drop_context[:, None, None], self.null.context, text.context),
            torch.where(drop_pooled[:, None], self.null.pooled, text.pooled),
        )

    def _condition(self, data: LatentBatch, generator: torch.Generator) -> Tensor | None:
        """[B,C+1,t,h,w] of the drawn kinds; None for a batch that is given nothing."""
        if set(self.kinds) == {"t2v"}:
            return None
        drawn = conditions.draw(self.kinds, len(data.latents), generator)
        return conditions.condition(data.latents, drawn, data.tails)
