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
    """Linear from lr / (warmup_steps + 1) in step 1 to lr in step warmup_steps + 1, then as the recipe says.

    `constant` stays there; `cosine` falls to zero after `steps` steps (1.3's stages 1, cfg/opensora-v1-3/train).
    """

    def factor(step: int) -> float:
        if step < section.warmup_steps or section.schedule == "constant":
            return min(1.0, (step + 1) / (section.warmup_steps + 1))
        left = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, left)))

    def make(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, factor)

    return make


def step_generator(device: torch.device, *parts: int) -> torch.Generator:
    """A generator seeded by (seed, data rank, step): noise is the same after a resume, and differs between ranks."""
    mixed = 0
    for part in parts:
        # A splitmix64 round per part: neighbouring steps get unrelated streams.
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed >> 1)
