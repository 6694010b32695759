"""AdamW and its learning-rate law, from a recipe's optimizer section."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ml.engines.protocol import MakeOptimizer, MakeScheduler
from ml.sections import Adam


def adamw(section: Adam) -> MakeOptimizer:
    """AdamW over fp32 masters; torch's fused kernel, which updates every tensor in one pass."""

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(
            parameters,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )

    return make


def schedule(section: Adam, steps: int) -> MakeScheduler:
    """The rate of each of `steps` steps, as `factor` says; a function of the step alone, so a resume repeats it."""

    def make(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: factor(section, step, steps))

    return make


def factor(section: Adam, step: int, steps: int) -> float:
    """What `lr` is multiplied by in the step after `step` steps, of a training of `steps`.

    The warm-up rises from 1 / (warmup_steps + 1) in the first step to 1 in step warmup_steps + 1 (ou/optimizer.py,
    main, with initial_lr 0). With k of the n steps after it done, x = k / n (1 beyond the end) and floor f:

        cosine        f + (1 - f) (1 + cos(pi x)) / 2
        linear        f + (1 - f) (1 - x)
        polynomial    f + (1 - f) (1 - x)^power
        inverse_sqrt  max(f, sqrt(w / (w + k))), w = max(1, warmup_steps)    (arXiv 1706.03762, section 5.3)
        wsd           1, then f + (1 - f) (1 - sqrt(y)), y the share of the decay that is done   (arXiv 2405.18392)
    """
    warmup, floor = section.warmup_steps, section.min_factor
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if section.schedule == "inverse_sqrt":
        first = max(1, warmup)
        return max(floor, math.sqrt(first / (first + step - warmup)))
    return floor + (1.0 - floor) * _left(section, step, steps)


def _left(section: Adam, step: int, steps: int) -> float:
    """How much of the way from `lr` down to the floor is left, 1 to 0."""
    done = _share(step, section.warmup_steps, steps)
    match section.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return 1.0 - done
        case "polynomial":
            return float((1.0 - done) ** _given(section.power))
        case "wsd":
            start = max(section.warmup_steps, steps - round(_given(section.decay_share) * steps))
            return 1.0 - math.sqrt(_share(step, start, steps))
    return 1.0


def _share(step: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` is done, 0 to 1."""
    return min(1.0, max(0, step - start) / max(1, end - start))


def _given(value: float | None) -> float:
    """A number that its law has (`ml.sections.Adam` sees to it)."""
    assert value is not None
    return value


def step_generator(device: torch.device, *parts: int) -> torch.Generator:
    """A generator seeded by (seed, epoch, index) of a batch: its noise is the same on any rank and after a resume."""
    mixed = 0
    for part in parts:
        # A splitmix64 round per part: neighbouring steps get unrelated streams.
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed >> 1)
