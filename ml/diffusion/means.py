"""Small arithmetic on latents that every process shares: a number for each sample, a mean over weighted frames.

Letters: B batch, C latent channels, t h w latent grid.
"""

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,...] with the dtype, device and number of axes of `like`."""
    return values.to(like.device, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def per_frame(values: Tensor, like: Tensor) -> Tensor:
    """[B,t] -> [B,1,t,1,1] on the device of `like`, its dtype kept: for masks and weights of latent frames."""
    return values.to(like.device)[:, None, :, None, None]


def over_frames(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each sample in float32, values [B,C,t,h,w] -> [B]; with weights [B,t], frames count by theirs.

    A sample whose weights are all zero has mean 0.
    """
    frames = values.float().mean((1, 3, 4))
    if weights is None:
        return frames.mean(1)
    shares = weights.to(frames.device, frames.dtype)
    return (frames * shares).sum(1) / shares.sum(1).clamp(min=torch.finfo(frames.dtype).tiny)


def given_weights(given: Tensor, weight: float) -> Tensor:
    """Loss weights [B,t] that sum to t: `weight` on given frames [B,t] bool, the rest shared by the others.

    1.3 scales the k given frames by w and the others by (t - k w) / (t - k) (os/rf/rectified_flow.py, 1.3).
    """
    frames, count = given.shape[1], given.sum(1, keepdim=True)
    others = (frames - count * weight) / (frames - count).clamp(min=1)
    return torch.where(given, torch.full_like(others, weight), others)
