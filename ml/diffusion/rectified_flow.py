"""Rectified flow as Open-Sora 2.0 trains it: straight lines from data (t = 0) to noise (t = 1).

Letters: B batch, ... any further axes; x0 data, x1 noise, s = sigma_min. On the line x_t = x0 + s x1 + t v with the
constant velocity v = (1 - s) x1 - x0, so Euler steps from t = 1 end at x0 + s x1 (scripts/diffusion/train.py, main).
"""

from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: Tensor, sigma_min: float) -> Tensor:
    """x_t = (1-t) x0 + (1 - (1-s)(1-t)) x1; data and noise [B,...], t [B] in 0..1."""
    t = per_sample(t, data)
    return (1 - t) * data + (1 - (1 - sigma_min) * (1 - t)) * noise


def target(data: Tensor, noise: Tensor, sigma_min: float) -> Tensor:
    """The velocity that the network learns: (1-s) x1 - x0, [B,...]."""
    return (1 - sigma_min) * noise - data


def loss(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample in float32, [B,...] -> [B]."""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(1)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,...] with the dtype and number of axes of `like`."""
    return t.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
