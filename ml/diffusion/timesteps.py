"""Which times are trained and sampled: logit-normal draws and an even grid, both shifted towards noise for large clips.

Times of the house run from 0 (data) to 1 (noise). Letters: B batch, n tokens of one latent frame, t latent frames.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ml.processes import AreaShift, LinearShift, RectifiedFlow


@dataclass(frozen=True)
class Shape:
    """A clip's frames, pixels, latent frames and tokens of one latent frame: all that a shift may depend on."""

    frames: int
    height: int
    width: int
    latent_frames: int
    tokens_per_frame: int


def shift_of(law: LinearShift | AreaShift, shape: Shape) -> float:
    """How far the times of a clip are shifted, alpha.

    2.0: linear in tokens per frame (not clamped), times sqrt(latent frames); 768px 16:9, 129 frames: 2304 tokens, 33
    latent frames -> 2.067 sqrt(33) = 11.87 (ou/sampling.py, main). 1.2 and 1.3: sqrt(H W / 512^2) sqrt(n) scale, with
    n latents counted as the autoencoder's generation does (os/rf, 1.2 and 1.3): 720p 16:9, 51 frames -> 1.875
    sqrt(15) = 7.26 in 1.2; 113 frames -> 1.875 sqrt(28) = 9.92 in 1.3.
    """
    if isinstance(law, LinearShift):
        slope = (law.max_alpha - law.min_alpha) / (law.max_tokens - law.min_tokens)
        spatial = law.min_alpha + slope * (shape.tokens_per_frame - law.min_tokens)
        return spatial * math.sqrt(shape.latent_frames) if law.temporal else spatial
    still = shape.frames == 1 or not law.temporal
    count = 1 if still else shape.frames // 17 * 5 if law.law == "v1_2" else (shape.frames - 1) // 4
    scale = 1.0 if still and law.law == "v1_3" else law.scale
    # A clip of less than 17 frames counts as none in the released law, which would put every time at 0.
    return math.sqrt(shape.height * shape.width / law.base_area) * math.sqrt(max(count, 1)) * scale


def shift(t: Tensor, by: float) -> Tensor:
    """a t / (1 + (a-1) t): keeps 0 and 1, moves everything between towards 1 for a > 1."""
    return by * t / (1 + (by - 1) * t)


def draw(objective: RectifiedFlow, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Training times [B] on the generator's device: sigmoid of a normal, shifted.

    Where `uniform_over` is set (1.3, clips only), times above it are drawn again, evenly between it and 1.
    """
    normal = torch.randn(count, generator=generator, device=generator.device)
    times = torch.sigmoid(objective.logit_mean + objective.logit_std * normal)
    times = shift(times, shift_of(objective.shift, shape))
    low = objective.uniform_over
    if low is None or shape.frames == 1:
        return times
    again = low + (1 - low) * torch.rand(count, generator=generator, device=generator.device)
    return torch.where(times > low, again, times)


def grid(steps: int, by: float) -> Tensor:
    """Sampling times [steps + 1] from exactly 1 (noise) down to exactly 0 (data), shifted by `by`; float64."""
    times = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), by)
    times[0], times[-1] = 1.0, 0.0
    return times
