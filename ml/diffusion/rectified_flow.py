"""Rectified flow: straight lines from data (t = 0) to noise (t = 1), with the conventions of 1.2, 1.3 and 2.0.

Letters: B batch, C latent channels, t h w latent grid; x0 data, x1 noise, s = sigma_min. On the line x_t = x0 + s x1 +
t v with the constant velocity v = (1 - s) x1 - x0, so Euler steps from t = 1 end at x0 + s x1
(scripts/diffusion/train.py, main). 1.2 and 1.3 have s = 0, learn -v in the first half of their channels, and tell the
network 1000 t (os/rf/rectified_flow.py, 1.2 and 1.3).
"""

import torch
from torch import Tensor

from ml import processes
from ml.diffusion import timesteps
from ml.diffusion.means import over_frames, per_frame, per_sample
from ml.diffusion.timesteps import Shape

# Time unit of the networks of 1.2 and 1.3.
UNIT = 1000.0


def interpolate(data: Tensor, noise: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """x_t = (1-t) x0 + (1 - (1-s)(1-t)) x1; data and noise [B,...], t [B] in 0..1."""
    t = per_sample(t, data)
    return (1 - t) * data + (1 - (1 - sigma_min) * (1 - t)) * noise


def target(data: Tensor, noise: Tensor, sigma_min: float) -> Tensor:
    """The velocity dx/dt of the line: (1-s) x1 - x0, [B,...]."""
    return (1 - sigma_min) * noise - data


class RectifiedFlow:
    """The process of a recipe's section; its own times are those of the house, 0 (data) to 1 (noise)."""

    def __init__(self, section: processes.RectifiedFlow) -> None:
        self.section = section
        self.is_v1 = section.law != "v2_0"

    def shift(self, shape: Shape) -> float:
        """How far the times of a clip are shifted towards noise."""
        return timesteps.shift_of(self.section.shift, shape)

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """Training times [B] in 0..1, shifted for the shape."""
        return timesteps.draw(self.section, count, shape, generator)

    def at(self, fraction: float, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The same time [B] for every sample: the fraction itself, unshifted."""
        return torch.full((count,), fraction, device=device)

    def network_time(self, times: Tensor) -> Tensor:
        """What the network is told, float32 [B]: 0..1000 in 1.2 and 1.3, 0..1 in 2.0."""
        return (times * UNIT if self.is_v1 else times).float()

    def noisy(self, data: Tensor, noise: Tensor, times: Tensor, active: Tensor | None = None) -> Tensor:
        """x_t of [B,C,t,h,w]; frames that are not `active` [B,t] stay as they are."""
        moved = interpolate(data, noise, times, self.section.sigma_min)
        return moved if active is None else torch.where(per_frame(active, data), moved, data)

    def velocity(self, output: Tensor, like: Tensor) -> Tensor:
        """dx/dt [B,C,t,h,w] of the network's raw output [B,C or 2C,t,h,w]; variances of 1.2 and 1.3 are not used."""
        found = output[:, : like.shape[1]]
        return -found if self.is_v1 else found

    def losses(
        self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Mean squared error [B] of the velocity, frames weighted by `weights` [B,t]; it is the same at every time."""
        wanted = target(data, noise, self.section.sigma_min)
        return over_frames((self.velocity(output, data).float() - wanted.float()).square(), weights)

    def errors(self, output: Tensor, data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mean squared error [B] of the velocity over all frames: what networks are compared by."""
        return self.losses(output, data, noise, times)
