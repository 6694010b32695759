"""OpenSora-VAE 1.3: one causal network for space and time in windows of 17 frames (om/vae_v1_3, 1.3; MAGVIT-v2's kind).

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid, h = H/8, w = W/8. A window of n = 4k+1
frames has k+1 latents. Windows share their border frame (`temporal_overlap`): 113 frames are seven windows of 17, so
35 latents, and the two pictures of a shared frame are averaged. Without overlap 34 frames are two windows.

The report's 5 floor((n-1)/16) is this count wherever whole windows fit. A clip may also end in a shorter window (21
frames have 5 + 2 latents): the original encodes it so, though its `get_latent_size` leaves that window out. Any length
is encoded, in a last window of n frames (n-1)/4 + 1 latents, rounded down; only windows of 4k+1 come back whole.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ml.architectures import Latent, OpenSoraV13Net
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.opensora_v1_3_layers import Network
from ml.models.autoencoders.original_names import read
from ml.models.autoencoders.start import start_opensora_v1_3
from ml.models.autoencoders.tiles import WHOLE, Tiling, tiled

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
# The original has no tiles in space. Ours are twice those of 2.0, with the same quarter of overlap.
TILE_PX, TILE_OVERLAP_PX = 512, 128
# Log variances are clipped to this range (om/vae/utils.py, 1.3).
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


class OpenSoraV13Autoencoder(VideoAutoencoder):
    """The released network (`net`, 259M parameters at the default size), window by window.

    A config or its fields. `use_tiled_conv3d` with `tile_size`, `micro_batch_size` and `micro_batch_size_2d` bound
    memory and change no result; in the original `micro_frame_size` has no effect while `micro_batch_size` is None,
    which here is a `micro_frame_size` of None: whole clips at once, as the original trains.
    Fields may have the original's names (original_names.py). Raises ValueError when `micro_frame_size` is not 4k+1.
    """

    net: Network
    least_side_px = 2

    def __init__(self, net: OpenSoraV13Net | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        given = read(OpenSoraV13Net, net, hyper)
        self.config = given.net
        size = self.config.micro_frame_size
        if size is not None and (size == 1 or (size - 1) % TEMPORAL_STRIDE):
            raise ValueError(f"micro_frame_size {size} is no window of {TEMPORAL_STRIDE}k+1 frames: take 5, 9, 13, 17")
        self.latent = latent or given.latent or Latent()
        self.latent_channels = self.config.latent_channels
        self.temporal_stride, self.spatial_stride = TEMPORAL_STRIDE, SPATIAL_STRIDE
        self.net = Network(self.config)
        self.tile(False)

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z, both [B,C,t,h,w], of a video [B,3,T,H,W]; ValueError below two pixels."""
        self.admit(video)
        parts = [self._encode(video[:, :, start : start + size]) for start, size in self._windows(video.shape[2])]
        mean, logvar = torch.cat(parts, dim=2).chunk(2, dim=1)
        return mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; ValueError when t latents are not T frames."""
        if frames != self.longest(z.shape[2]):
            shown = self.longest(z.shape[2])
            raise ValueError(f"cannot decode {z.shape[2]} latents to {frames} frames: they are {shown}")
        size = self.config.micro_frame_size
        windows = torch.split(z, self._latents(size) if size else z.shape[2], dim=2)
        parts = [self._decode(windows[0])]
        for window in windows[1:]:
            part = self._decode(window)
            if self.config.temporal_overlap:
                shared = (parts[-1][:, :, -1:] + part[:, :, :1]) / 2
                parts[-1], part = torch.cat([parts[-1][:, :, :-1], shared], dim=2), part[:, :, 1:]
            parts.append(part)
        return torch.cat(parts, dim=2)

    def latent_frames(self, frames: int) -> int:
        """Latents of T frames: those of all windows; ValueError below one frame."""
        if frames < 1:
            raise ValueError(f"cannot encode {frames} frames: a clip has at least one")
        return sum(self._latents(size) for _, size in self._windows(frames))

    def longest(self, latent_frames: int) -> int:
        """Frames that t latents are decoded to: 4k+1 of every window, less those that windows share."""
        if latent_frames < 1:
            raise ValueError(f"cannot decode {latent_frames} latents: a clip has at least one")
        size = self.config.micro_frame_size
        windows = -(-latent_frames // self._latents(size)) if size else 1
        frames = TEMPORAL_STRIDE * latent_frames - (TEMPORAL_STRIDE - 1) * windows
        return frames - (windows - 1 if self.config.temporal_overlap else 0)

    def tile(self, enabled: bool) -> None:
        """Switch tiles of 512 px, which the original does not have: a larger plane changes a little, a smaller not."""
        size, overlap = TILE_PX // SPATIAL_STRIDE, TILE_OVERLAP_PX // SPATIAL_STRIDE
        shrink = (Fraction(1, TEMPORAL_STRIDE), Fraction(1, SPATIAL_STRIDE), Fraction(1, SPATIAL_STRIDE))
        grow = (TEMPORAL_STRIDE, SPATIAL_STRIDE, SPATIAL_STRIDE)
        encode = Tiling((WHOLE, TILE_PX, TILE_PX), (0, TILE_OVERLAP_PX, TILE_OVERLAP_PX), shrink)
        decode = Tiling((WHOLE, size, size), (0, overlap, overlap), grow)
        self._tilings = (encode, decode) if enabled else None

    def train_only(self, part: str) -> None:
        """Let training change this part of the network: `all`, as it has no other; raises ValueError else."""
        if part != "all":
            raise ValueError(f"OpenSora-VAE 1.3 has no part {part!r}: it is one network, train 'all'")
        self.requires_grad_(True)

    def initialise(self) -> None:
        """Weights to train a small network from: it starts as the blurred colour picture (`start.py`)."""
        start_opensora_v1_3(self.net, self.latent_channels)

    def _windows(self, frames: int) -> list[tuple[int, int]]:
        """(first frame, frames) of every window of a clip."""
        size = self.config.micro_frame_size
        if size is None or frames == 1:
            return [(0, frames)]
        shared = 1 if self.config.temporal_overlap else 0
        return [(start, min(size, frames - start)) for start in range(0, frames - shared, size - shared)]

    @staticmethod
    def _latents(window: int) -> int:
        return (window - 1) // TEMPORAL_STRIDE + 1

    def _encode(self, window: Tensor) -> Tensor:
        """Moments [B,2C,k+1,h,w] of one window."""
        return self._apart(self.net.encoder, window, self._tilings and self._tilings[0])

    def _decode(self, window: Tensor) -> Tensor:
        """Frames [B,3,4k+1,H,W] of one window of latents."""
        return self._apart(self.net.decoder, window, self._tilings and self._tilings[1])

    def _apart(self, network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling | None) -> Tensor:
        """Apply a network to `micro_batch_size` clips at a time, in tiles."""
        parts = torch.split(x, self.config.micro_batch_size or len(x))
        return torch.cat([network(part) if tiling is None else tiled(network, part, tiling) for part in parts])
