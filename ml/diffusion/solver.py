"""From noise to a sample: Euler steps along the velocity, over a grid of times.

Letters: B batch, C latent channels, t h w latent grid.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float, int], Tensor]


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Starting noise [B,*shape] on the CPU, one seed a sample, so that a sample does not depend on its batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def solve(velocity: Velocity, start: Tensor, grid: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
    """Euler from `start` [B,C,t,h,w] at grid[0] to grid[-1]: x += (t_next - t) velocity(x, t, index).

    `progress` is called after each step with the number of steps done.
    """
    x, times = start, grid.tolist()
    for index, (now, then) in enumerate(pairwise(times)):
        x = x + (then - now) * velocity(x, now, index)
        if progress is not None:
            progress(index + 1)
    return x
