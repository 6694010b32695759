"""What a training step of the autoencoder minimises: L1 of the pixels, LPIPS of the frames, KL of the latents.

Letters: B batch, T frames, H W pixels, C latent channels, t h w latent grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ml.engines.protocol import Engine
from ml.sections import AutoencoderLoss
from ml.training.step import Loss

Perceptual = Callable[[Tensor, Tensor], Tensor]


class Reconstruction:
    """Weighted sum of the terms; `perceptual` takes two batches of pictures [N,3,H,W] and gives distances [N].

    Raises ValueError when the recipe weighs a perceptual term and there is no network for it.
    """

    def __init__(self, section: AutoencoderLoss, perceptual: Perceptual | None) -> None:
        if section.perceptual > 0 and perceptual is None:
            raise ValueError("loss.perceptual is above 0, which needs an LPIPS network: give one, or set it to 0")
        self.section, self.perceptual = section, perceptual

    def loss(self, engine: Engine, data: Tensor, generator: torch.Generator) -> Loss:
        """Loss of a video batch [B,3,T,H,W] in [-1, 1]; tokens are latent positions."""
        video = data.to(engine.device, engine.dtype)
        reconstruction, mean, logvar = engine.model(video, generator)
        value = self.section.reconstruction * (reconstruction - video).abs().float().mean()
        value = value + self.section.kl * kl(mean.float(), logvar.float())
        if self.perceptual is not None and self.section.perceptual > 0:
            value = value + self.section.perceptual * self.perceptual(pictures(reconstruction), pictures(video)).mean()
        return Loss(value, len(video), mean.numel() // mean.shape[1])


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from the standard normal, averaged over all latent values: 0.5 (mean^2 + var - 1 - log var)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def pictures(video: Tensor) -> Tensor:
    """Frames of a video as a batch of pictures: [B,3,T,H,W] -> [B T,3,H,W]."""
    return video.transpose(1, 2).flatten(0, 1)
