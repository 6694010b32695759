"""AdamW and its warm-up, from a recipe's optimizer section."""

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


def warm_up(section: Adam) -> MakeScheduler:
    """Linear from lr / (warmup_steps + 1) in step 1 to lr in step warmup_steps + 1, then constant."""

    def make(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (section.warmup_steps + 1)))

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
