"""What training and measuring ask of a diffusion process, whatever its generation, and which one a recipe means.

Letters: B batch, C latent channels, t h w latent grid.
"""

from typing import Protocol

import torch
from torch import Tensor

from ml import processes
from ml.diffusion.iddpm import IDDPM
from ml.diffusion.rectified_flow import RectifiedFlow
from ml.diffusion.timesteps import Shape

__all__ = ["Process", "Shape", "build_process"]


class Process(Protocol):
    """How data becomes noise, and what the network learns of it; `times` [B] are in the process's own unit."""

    def shift(self, shape: Shape) -> float:
        """How far the times of a clip are shifted towards noise (1 = not)."""
        ...

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """Training times [B]."""
        ...

    def at(self, fraction: float, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The same time [B] for every sample, a fraction 0..1 of the way to noise: for a fixed held-out grid."""
        ...

    def network_time(self, times: Tensor) -> Tensor:
        """What the network is told, float32 [B]."""
        ...

    def noisy(self, data: Tensor, noise: Tensor, times: Tensor, active: Tensor | None = None) -> Tensor:
        """Data [B,C,t,h,w] with noise of the same shape at `times`; frames not `active` [B,t] bool stay clean."""
        ...

    def losses(
        self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Training loss [B] of the network's raw output [B,C or 2C,t,h,w]; frames count by `weights` [B,t]."""
        ...

    def errors(self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error [B] alone, over all frames: what networks are compared by."""
        ...


def build_process(section: processes.IDDPM | processes.RectifiedFlow) -> Process:
    """The process of a recipe's `objective` section."""
    return IDDPM(section) if isinstance(section, processes.IDDPM) else RectifiedFlow(section)
