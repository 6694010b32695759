"""Classifier-free guidance without wasted rows: per step, which rows the network must evaluate, and their weights.

Open-Sora 2.0 evaluates three rows a step, p = (prompt, given), u = (negative, given), n = (negative, nothing), and
takes n + g_image (u - n) + g_text (p - u) (ou/sampling.py, main). That is the weighted sum g_text p +
(g_image - g_text) u + (1 - g_image) n: rows of weight zero need no evaluation, and without a given frame u and n are
one row. Fifty oscillating steps need 80 evaluations instead of 150 for text-to-video and 110 for image-to-video, with
equal results.

Letters: B batch, R rows, C latent channels, t h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ml import sections
from ml.diffusion.conditions import Kind

# Guidance is at full strength for this many steps, then on even steps only (ou/sampling.py, main).
FULL_STEPS = 10

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Row(NamedTuple):
    """One evaluation of the network: with which text, and whether with the given latents."""

    text: Literal["prompt", "negative"]
    given: bool


@dataclass(frozen=True)
class Step:
    """Rows of one step with their weights: one number, or one for each latent frame."""

    weights: dict[Row, tuple[float, ...]]


@dataclass(frozen=True)
class Guidance:
    """Scales of text and image guidance; `oscillate` switches both off on every odd step after the tenth.

    It also ramps image guidance for i2v kinds: over latent time from 1 up to a value that falls to 1 over the steps.
    """

    text: float
    image: float
    oscillate: bool

    @classmethod
    def of(cls, sampling: sections.Sampling) -> "Guidance":
        """As a recipe's sampling section says."""
        return cls(sampling.guidance_text, sampling.guidance_image, sampling.oscillate)


@dataclass(frozen=True)
class Text:
    """Embedded texts of a batch: context [B,L,D] and pooled [B,P]."""

    context: Tensor
    pooled: Tensor


def plan(guidance: Guidance, steps: int, kind: Kind, latent_frames: int) -> list[Step]:
    """The rows of every step, exactly as many as the result depends on."""
    return [_step(guidance, index, steps, kind, latent_frames) for index in range(steps)]


def num_evaluations(steps: Sequence[Step]) -> int:
    """Rows that the network evaluates for one sample."""
    return sum(len(step.weights) for step in steps)


@dataclass(frozen=True)
class GuidedVelocity:
    """The guided velocity of a batch, for the solver: `guided(x, t, index)`.

    `network` is called as network(x, t, context, pooled, condition) with all rows of a step in one batch of B R rows.
    """

    network: Velocity
    steps: Sequence[Step]
    prompt: Text
    negative: Text
    condition: Tensor | None = None

    def __call__(self, x: Tensor, t: float, index: int) -> Tensor:
        """x [B,C,t,h,w] at time t of step `index` -> velocity [B,C,t,h,w]."""
        weights = self.steps[index].weights
        rows, num_rows = list(weights), len(weights)
        texts = [self.prompt if row.text == "prompt" else self.negative for row in rows]
        velocity = self.network(
            torch.cat([x] * num_rows),
            torch.full((num_rows * x.shape[0],), t, dtype=torch.float32, device=x.device),
            torch.cat([text.context for text in texts]),
            torch.cat([text.pooled for text in texts]),
            self._condition(rows),
        )
        parts = zip(velocity.chunk(num_rows), weights.values(), strict=True)
        return torch.stack([part * _weight(weight, part) for part, weight in parts]).sum(0)

    def _condition(self, rows: Sequence[Row]) -> Tensor | None:
        if self.condition is None:
            return None
        return torch.cat([self.condition if row.given else torch.zeros_like(self.condition) for row in rows])


def _step(guidance: Guidance, index: int, steps: int, kind: Kind, latent_frames: int) -> Step:
    full = not guidance.oscillate or index < FULL_STEPS or index % 2 == 0
    text = guidance.text if full else 1.0
    image: tuple[float, ...] = (guidance.image if full else 1.0,)
    if guidance.oscillate and kind.startswith("i2v") and image[0] > 1.0:
        image = _ramp(image[0], index, steps, latent_frames)
    given = kind != "t2v"
    terms = (
        (Row("prompt", given), (text,)),
        (Row("negative", given), tuple(value - text for value in image)),
        (Row("negative", False), tuple(1.0 - value for value in image)),
    )
    weights: dict[Row, tuple[float, ...]] = {}
    for row, weight in terms:
        weights[row] = _add(weights[row], weight) if row in weights else weight
    return Step({row: weight for row, weight in weights.items() if any(weight)})


def _ramp(scale: float, index: int, steps: int, latent_frames: int) -> tuple[float, ...]:
    """Over latent time from 1 to a top that falls from `scale` towards 1 over the sampling steps."""
    top = scale + (1.0 - scale) * index / steps
    return tuple(1.0 + (top - 1.0) * frame / max(1, latent_frames - 1) for frame in range(latent_frames))


def _add(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    length = max(len(left), len(right))
    wide = [values * length if len(values) == 1 else values for values in (left, right)]
    return tuple(a + b for a, b in zip(*wide, strict=True))


def _weight(weight: tuple[float, ...], like: Tensor) -> Tensor:
    """[1] or [t] -> [1,1,1 or t,1,1]."""
    return torch.tensor(weight, dtype=like.dtype, device=like.device)[None, None, :, None, None]
