"""DPM-Solver++ of second order, multistep: 20 evaluations where ancestral sampling takes 100 (arXiv 2211.01095).

It solves the deterministic equation of a diffusion process in l = log(alpha / sigma), where x_t = alpha_t x0 + sigma_t
eps, with one evaluation a step: the predicted data is drawn as a line through the two latest predictions. Continuous
times are (i + 1) / N for the training steps i, log alpha is linear between them, and times run evenly from 1 to 1 / N
(os/dpms, 1.1: `time_uniform`, order 2, no step to zero). The released clip of l at -5.1 does not touch the released
betas and is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ml.diffusion.iddpm import Schedule

# Below this many steps the last one is of first order, which is steadier (os/dpms/dpm_solver.py, 1.1).
FEW_STEPS = 10

# (x [B,...], training step as a real number, index of the sampling step) -> predicted noise [B,...]
NoiseOf = Callable[[Tensor, float, int], Tensor]


@dataclass(frozen=True)
class Level:
    """Noise at one time: shares of data and noise, l = log(alpha / sigma), and the training step it stands for."""

    alpha: float
    sigma: float
    log_ratio: float
    step: float


def levels(schedule: Schedule, steps: int) -> list[Level]:
    """The `steps` + 1 levels that are visited, from all noise to the least that was trained."""
    total = len(schedule)
    return [
        _level(schedule, time) for time in torch.linspace(1.0, 1.0 / total, steps + 1, dtype=torch.float64).tolist()
    ]


@torch.no_grad()
def solve(
    noise_of: NoiseOf, start: Tensor, schedule: Schedule, steps: int, progress: Callable[[int], None] | None = None
) -> Tensor:
    """From noise `start` [B,...] to a sample; `noise_of` is asked once a step, `progress` told the steps done.

    Raises ValueError for less than 2 steps: the method is of second order.
    """
    if steps < 2:
        raise ValueError(f"DPM-Solver++ of second order needs 2 steps at least, got {steps}")
    visited, x = levels(schedule, steps), start
    before: tuple[Level, Tensor] | None = None
    for index in range(steps):
        now, then = visited[index], visited[index + 1]
        data = (x - now.sigma * noise_of(x, now.step, index)) / now.alpha
        last = index == steps - 1 and steps < FEW_STEPS
        guess = data if before is None or last else _extrapolated(data, now, before, then)
        # The exact solution of the linear part; expm1 keeps small steps accurate.
        move = torch.expm1(torch.tensor(now.log_ratio - then.log_ratio, dtype=torch.float64)).item()
        x = then.sigma / now.sigma * x - then.alpha * move * guess
        before = (now, data)
        if progress is not None:
            progress(index + 1)
    return x


def _extrapolated(data: Tensor, now: Level, before: tuple[Level, Tensor], then: Level) -> Tensor:
    """The predicted data half a step ahead, on the line through the latest two predictions."""
    level, earlier = before
    ratio = (then.log_ratio - now.log_ratio) / (now.log_ratio - level.log_ratio)
    return data + ratio / 2 * (data - earlier)


def _level(schedule: Schedule, time: float) -> Level:
    """Noise at a continuous time in 1/N..1."""
    step = time * len(schedule) - 1
    logs = schedule.kept.log() / 2
    low = min(max(int(step), 0), len(schedule) - 2)
    log_alpha = logs[low] + (step - low) * (logs[low + 1] - logs[low])
    log_sigma = torch.log1p(-torch.exp(2 * log_alpha)) / 2
    return Level(log_alpha.exp().item(), log_sigma.exp().item(), (log_alpha - log_sigma).item(), step)
