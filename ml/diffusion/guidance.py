"""Classifier-free guidance without wasted rows: per step, which rows the network must evaluate, and their weights.

Open-Sora 2.0 evaluates three rows a step, p = (prompt, given), u = (negative, given), n = (negative, nothing), and
takes n + g_image (u - n) + g_text (p - u) (ou/sampling.py, main; os/rf/__init__.py, 1.3). That is the weighted sum
g_text p + (g_image - g_text) u + (1 - g_image) n: rows of weight zero need no evaluation, and without a given frame u
and n are one row, which leaves the two of 1.0, 1.1 and 1.2. Fifty oscillating steps need 80 evaluations instead of 150
for text-to-video and 110 for image-to-video, with equal results.

Letters: B batch, R rows, C latent channels, t h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ml import processes
from ml.models.inputs import Inputs, Text

__all__ = ["Call", "Guidance", "Guided", "Row", "Step", "Text", "null_text", "num_evaluations", "plan"]

# Guidance is at full strength for this many steps, then on even steps only (ou/sampling.py, main; `force_num`, 1.3).
FULL_STEPS = 10
# How much of the guided output's spread is replaced by the conditional one's (os/rf/__init__.py, 1.3).
FLAW_SHARE = 0.7

# network(x [R B,C,t,h,w], t [R B] in the network's unit, inputs) -> raw output [R B,C or 2C,t,h,w]
Call = Callable[[Tensor, Tensor, Inputs], Tensor]


class Row(NamedTuple):
    """One evaluation of the network: with which text, and whether with the given latents."""

    text: Literal["prompt", "negative"]
    given: bool


@dataclass(frozen=True)
class Step:
    """Rows of one step with their weights: one number, or one for each latent frame. The prompt's row is always one."""

    weights: dict[Row, tuple[float, ...]]


@dataclass(frozen=True)
class Guidance:
    """Scales of text and image guidance, and how they move.

    `oscillate` takes both to 1 on every odd step after the tenth. `ramp` lets image guidance run over latent time from
    1 up to a top that falls towards 1 over the steps: in 2.0 for i2v kinds only and never quite to 1, in 1.3 (`closed`)
    for every kind and to exactly 1 at the last step. `channels` are guided, all when None; `flaw_fix` as 1.3.
    """

    text: float
    image: float = 1.0
    oscillate: bool = False
    ramp: bool = False
    closed: bool = False
    channels: int | None = None
    flaw_fix: bool = False

    @classmethod
    def of(cls, objective: processes.IDDPM | processes.RectifiedFlow, sampling: processes.Sampling) -> "Guidance":
        """As a recipe's sections say."""
        return cls(
            text=sampling.guidance_text,
            image=sampling.guidance_image,
            oscillate=sampling.oscillate,
            ramp=sampling.ramp,
            closed=isinstance(objective, processes.RectifiedFlow) and objective.law == "v1_3",
            channels=sampling.guided_channels,
            flaw_fix=sampling.flaw_fix,
        )


def plan(guidance: Guidance, steps: int, kind: str, latent_frames: int) -> list[Step]:
    """The rows of every step, exactly as many as the result depends on.

    `t2v` and `mask` (whose given frames stand in x itself) are guided by text alone.
    """
    return [_step(guidance, index, steps, kind, latent_frames) for index in range(steps)]


def num_evaluations(steps: Sequence[Step]) -> int:
    """Rows that the network evaluates for one sample."""
    return sum(len(step.weights) for step in steps)


def null_text(prompt: Text, null_context: Tensor | None, negative: Text | None = None) -> Text:
    """What stands for no text: the negative prompt where there is one, else the network's own null context [L,D].

    The null context goes with the prompt's mask, as the original repeats it: as many of its tokens are attended to as
    the prompt has. A network without one needs the (empty) negative prompt embedded. Raises ValueError when there is
    neither, or when the null context is shorter than the prompt's.
    """
    if negative is not None:
        return negative.to(prompt.context.device, prompt.context.dtype)
    if null_context is None:
        raise ValueError("the network holds no null context: embed the negative prompt, an empty one if need be")
    length = prompt.context.shape[1]
    if length > len(null_context):
        raise ValueError(f"the prompt has {length} tokens, the network's null context {len(null_context)}")
    context = null_context[:length].to(prompt.context.device, prompt.context.dtype)
    return replace(prompt, context=context.expand(len(prompt.context), -1, -1))


@dataclass(frozen=True)
class Guided:
    """The guided raw output of a batch: `guided(x, t, index)`, with all rows of a step in one batch of R B rows.

    `prompt` and `null` are the inputs of B samples, with the condition [B,C+1,t,h,w] where latents are given; `nothing`
    is the condition of a row without them.
    """

    call: Call
    guidance: Guidance
    steps: Sequence[Step]
    prompt: Inputs
    null: Inputs
    nothing: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, index: int, active: Tensor | None = None) -> Tensor:
        """x [B,C,t,h,w] at t [B] (the network's unit) of step `index` -> raw output [B,C or 2C,t,h,w].

        Channels that are not guided, a learned variance among them, are the prompt row's.
        """
        weights = self.steps[index].weights
        inputs = Inputs.stack([self._inputs(row, active) for row in weights])
        output = self.call(torch.cat([x] * len(weights)), t.repeat(len(weights)), inputs)
        parts = dict(zip(weights, output.chunk(len(weights)), strict=True))
        prompt = next(part for row, part in parts.items() if row.text == "prompt")
        guided = x.shape[1] if self.guidance.channels is None else self.guidance.channels
        summed = [part[:, :guided] * _weight(weights[row], part) for row, part in parts.items()]
        found = torch.stack(summed).sum(0)
        if self.guidance.flaw_fix and not any(row.given for row in weights):
            found = fix_flaw(found, prompt[:, :guided])
        return torch.cat([found, prompt[:, guided:]], dim=1)

    def _inputs(self, row: Row, active: Tensor | None) -> Inputs:
        inputs = replace(self.prompt if row.text == "prompt" else self.null, active=active)
        return inputs if row.given else replace(inputs, condition=self.nothing)


def fix_flaw(guided: Tensor, conditional: Tensor) -> Tensor:
    """Pull each sample's spread towards the conditional output's: v (0.7 std(v_cond) / std(v) + 0.3), as 1.3."""
    spreads = [part.std(dim=tuple(range(1, part.ndim)), keepdim=True) for part in (conditional, guided)]
    return guided * (FLAW_SHARE * spreads[0] / spreads[1] + (1 - FLAW_SHARE))


def _step(guidance: Guidance, index: int, steps: int, kind: str, latent_frames: int) -> Step:
    full = not guidance.oscillate or index < FULL_STEPS or index % 2 == 0
    text = guidance.text if full else 1.0
    given = kind not in ("t2v", "mask")
    image: tuple[float, ...] = (guidance.image if full and given else 1.0,)
    if guidance.ramp and image[0] > 1.0 and (guidance.closed or kind.startswith("i2v")):
        share = index / (max(1, steps - 1) if guidance.closed else steps)
        image = _ramp(image[0], share, latent_frames)
    terms = (
        (Row("prompt", given), (text,)),
        (Row("negative", given), tuple(value - text for value in image)),
        (Row("negative", False), tuple(1.0 - value for value in image)),
    )
    weights: dict[Row, tuple[float, ...]] = {}
    for row, weight in terms:
        weights[row] = _add(weights[row], weight) if row in weights else weight
    return Step({row: weight for row, weight in weights.items() if any(weight)})


def _ramp(scale: float, share: float, latent_frames: int) -> tuple[float, ...]:
    """Over latent time from 1 to a top that has gone the share from `scale` to 1."""
    top = scale + (1.0 - scale) * share
    return tuple(1.0 + (top - 1.0) * frame / max(1, latent_frames - 1) for frame in range(latent_frames))


def _add(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    length = max(len(left), len(right))
    wide = [values * length if len(values) == 1 else values for values in (left, right)]
    return tuple(a + b for a, b in zip(*wide, strict=True))


def _weight(weight: tuple[float, ...], like: Tensor) -> Tensor:
    """[1] or [t] -> [1,1,1 or t,1,1]."""
    return torch.tensor(weight, dtype=like.dtype, device=like.device)[None, None, :, None, None]
