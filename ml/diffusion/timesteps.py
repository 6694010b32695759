"""Which times are trained and sampled: logit-normal draws and an even grid, both shifted towards noise for large clips.

Letters: B batch, n tokens of one latent frame, t latent frames.
"""

import math

import torch
from torch import Tensor

from ml import sections


def alpha(law: sections.Shift, tokens_per_frame: int, latent_frames: int) -> float:
    """Shift of a clip: linear in tokens per frame (not clamped), times sqrt(latent frames) where the law is temporal.

    768px 16:9, 129 frames: 2304 tokens, 33 latent frames -> 2.067 sqrt(33) = 11.87 (ou/sampling.py, main).
    """
    slope = (law.max_alpha - law.min_alpha) / (law.max_tokens - law.min_tokens)
    spatial = law.min_alpha + slope * (tokens_per_frame - law.min_tokens)
    return spatial * math.sqrt(latent_frames) if law.temporal else spatial


def shift(t: Tensor, by: float) -> Tensor:
    """a t / (1 + (a-1) t): keeps 0 and 1, moves everything between towards 1 for a > 1."""
    return by * t / (1 + (by - 1) * t)


def draw(objective: sections.RectifiedFlow, count: int, by: float, generator: torch.Generator) -> Tensor:
    """Training times [B] on the generator's device: sigmoid of a normal, shifted by `by`."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    return shift(torch.sigmoid(objective.logit_mean + objective.logit_std * normal), by)


def grid(steps: int, by: float) -> Tensor:
    """Sampling times [steps + 1] from 1 (noise) down to 0 (data), shifted by `by`; float64."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), by)
