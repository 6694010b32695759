"""What every autoencoder of the house offers: encode, decode, latent lengths, tiling, training form, released names.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid. Videos are in [-1, 1]. Raw latents z are
what the network gives; latents are normalised, (z - mean) / std * scale, so that transformers see about unit spread.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ml.architectures import Latent


@dataclass(frozen=True)
class Passed:
    """A training pass: the rebuilt video, the posterior of z, and the inner pair of a two-stage network.

    `logvar` is None for networks without a posterior. `inner` is (per-frame latent, its reconstruction), both
    [B,C',T,h,w], and `sample` the z that was decoded, for the terms that only OpenSora-VAE 1.2 has.
    """

    video: Tensor
    mean: Tensor
    logvar: Tensor | None
    sample: Tensor
    inner: tuple[Tensor, Tensor] | None = None


Part = Literal["all", "spatial", "temporal"]


class VideoAutoencoder(nn.Module):
    """Base class; `net` holds the parameters under the released names, `latent` how z is normalised."""

    net: nn.Module
    latent: Latent
    latent_channels: int
    temporal_stride: int
    spatial_stride: int
    # The smallest height and width that halving leaves a cell of.
    least_side_px = 1
    # What released files put before every name of `net`.
    released_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        hook: Callable[..., Any] = self.register_load_state_dict_pre_hook
        hook(_under_net)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Passed:
        """Training form of a video [B,3,T,H,W]: a posterior sample is decoded."""
        mean, logvar = self.posterior(video)
        sample = draw(mean, logvar, generator)
        return Passed(self.rebuild(sample, video.shape[2]), mean, logvar, sample)

    @abstractmethod
    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log variance (None without one) of raw z, [B,C,t,h,w]; ValueError when it cannot be encoded."""

    @abstractmethod
    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; `frames` is T, where t alone does not say it."""

    @abstractmethod
    def latent_frames(self, frames: int) -> int:
        """Latent frames t of T frames; ValueError when T cannot be encoded.

        A network may encode more lengths than come back whole, and than a recipe takes (`ml.shapes.Strides`).
        """

    @abstractmethod
    def tile(self, enabled: bool) -> None:
        """Switch tiling: large inputs are cut into blended tiles, which bounds memory and changes results a little.

        What is cut, and where a network has hyper-parameters for that, they decide.
        """

    @abstractmethod
    def initialise(self) -> None:
        """Give a small network weights to train from: it begins as the blurred picture, not as noise."""

    @abstractmethod
    def train_only(self, part: Part) -> None:
        """Freeze everything else; ValueError for a part that the network does not have."""

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latent of a video [B,3,T,H,W] in [-1,1]: the posterior mean, [B,C,t,h,w]."""
        mean, std = self._statistics(video)
        return (self.posterior(video)[0] - mean) / std * self.latent.scale

    def decode(self, latent: Tensor, frames: int | None = None) -> Tensor:
        """Video [B,3,T,H,W] of a latent [B,C,t,h,w]; values may leave [-1,1] a little: clamp before saving.

        `frames` is T; None is what the original gives (`shown`).
        """
        mean, std = self._statistics(latent)
        return self.rebuild(latent / self.latent.scale * std + mean, frames or self.shown(latent.shape[2]))

    def shown(self, latent_frames: int) -> int:
        """Frames that are decoded where their number is not said: the longest clip."""
        return self.longest(latent_frames)

    def longest(self, latent_frames: int) -> int:
        """The longest clip that comes back from so many latent frames; ValueError when there is none."""
        lengths = [n for n in range(1, latent_frames * self.temporal_stride + 1) if self._has(n, latent_frames)]
        if not lengths:
            raise ValueError(f"cannot decode {latent_frames} latent frames: no clip has so many")
        return lengths[-1]

    def admit(self, video: Tensor) -> None:
        """Raise ValueError for a video [B,3,T,H,W] that the network cannot encode; strides need not divide it."""
        self.latent_frames(video.shape[2])
        height, width = video.shape[3:]
        if min(height, width) < self.least_side_px:
            raise ValueError(
                f"cannot encode {height}x{width}: height and width must be {self.least_side_px} pixels at least"
            )

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip; raises ValueError when the strides do not divide it."""
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"cannot encode {height}x{width}: height and width must be multiples of {self.spatial_stride}"
            )
        grid = (height // self.spatial_stride, width // self.spatial_stride)
        return (self.latent_channels, self.latent_frames(frames), *grid)

    def _has(self, frames: int, latent_frames: int) -> bool:
        try:
            return self.latent_frames(frames) == latent_frames
        except ValueError:
            return False

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of raw z, [1,C or 1,1,1,1]."""
        parts = (self.latent.mean or (0.0,), self.latent.std or (1.0,))
        mean, std = (torch.tensor(p, dtype=like.dtype, device=like.device)[None, :, None, None, None] for p in parts)
        return mean, std


def draw(mean: Tensor, logvar: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """A sample of the posterior; the mean where there is none."""
    if logvar is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + (0.5 * logvar).exp() * noise


def _under_net(module: VideoAutoencoder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take a file under released names: they are those of `net`."""
    names = [name for name in state if name.startswith(prefix)]
    if any(name.startswith(f"{prefix}net.") for name in names):
        return
    for name in names:
        released = name.removeprefix(prefix).removeprefix(module.released_prefix)
        state[f"{prefix}net.{released}"] = state.pop(name)
