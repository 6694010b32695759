"""The causal autoencoder of HunyuanVideo, which Open-Sora 2.0 uses: diffusers' network, the house's interface.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid, t = (T-1)/4 + 1, h = H/8, w = W/8.
Convolutions, padding and attention are causal, so a picture is a clip of one frame; group norms are taken over the
whole clip, so the first latent of a clip is near, not equal to, that of its first frame alone.

Diffusers' layers and Open-Sora's (om/hunyuan_vae, main) have the same names, shapes and results. Only their tiles
differ: ours are cut and blended as Open-Sora 2.0 does, and by 64 frames, where time is cut, not by 16.
"""

from fractions import Fraction
from typing import Any

from torch import Tensor

from ml.architectures import HunyuanNet, Latent
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.original_names import HUNYUAN_SCALE, read
from ml.models.autoencoders.start import start_hunyuan
from ml.models.autoencoders.tiles import Tiling, cut, tiled

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
SHRINK = (Fraction(1, TEMPORAL_STRIDE), Fraction(1, SPATIAL_STRIDE), Fraction(1, SPATIAL_STRIDE))
# Log variances are clipped to this range (om/hunyuan_vae/vae.py, main).
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


class HunyuanAutoencoder(VideoAutoencoder):
    """The released network (`net`, 246M parameters at the default size) from a config or its fields.

    Fields may have the names of `AutoEncoder3DConfig` (original_names.py). Without a `latent` the released scale
    0.476986 holds. Raises ValueError for tiles that are no whole number of latent cells.
    """

    net: Any  # diffusers' classes are untyped

    def __init__(self, net: HunyuanNet | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        from diffusers import AutoencoderKLHunyuanVideo

        given = read(HunyuanNet, net, hyper)
        self.config = config = given.net
        self.latent = latent or given.latent or Latent(scale=HUNYUAN_SCALE)
        self.latent_channels = config.latent_channels
        self.temporal_stride, self.spatial_stride = TEMPORAL_STRIDE, SPATIAL_STRIDE
        build: Any = AutoencoderKLHunyuanVideo  # untyped
        self.net = build(
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
        )
        self._tilings = _tilings(config)
        self._tiled = False

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z, both [B,C,t,h,w], sizes rounded up; ValueError without a frame."""
        self.admit(video)
        moments = tiled(self._encode, video, self._tilings[0]) if self._tiled else self._encode(video)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; raises ValueError unless T = 4(t-1) + 1."""
        if frames != self.longest(z.shape[2]):
            shown = self.longest(z.shape[2])
            raise ValueError(f"cannot decode {z.shape[2]} latents to {frames} frames: they are {shown}")
        return tiled(self._decode, z, self._tilings[1]) if self._tiled else self._decode(z)

    def latent_frames(self, frames: int) -> int:
        """(T-1)/4 + 1, rounded down, for any T (only 4k+1 frames come back whole); ValueError below one."""
        if frames < 1:
            raise ValueError(f"cannot encode {frames} frames: a clip has at least one")
        return (frames - 1) // TEMPORAL_STRIDE + 1

    def longest(self, latent_frames: int) -> int:
        """4(t-1) + 1, what t latents are decoded to; ValueError below one."""
        if latent_frames < 1:
            raise ValueError(f"cannot decode {latent_frames} latents: a clip has at least one")
        return (latent_frames - 1) * TEMPORAL_STRIDE + 1

    def tile(self, enabled: bool) -> None:
        """Switch tiles, in space and in time as the hyper-parameters say: larger inputs change a little, others not."""
        self._tiled = enabled

    def train_only(self, part: str) -> None:
        """Let training change this part of the network: `all`, as it has no other; raises ValueError else."""
        if part != "all":
            raise ValueError(f"the HunyuanVideo autoencoder has no part {part!r}: it is one network, train 'all'")
        self.requires_grad_(True)

    def initialise(self) -> None:
        """Weights to train a small network from: it starts as the blurred colour picture (`start.py`)."""
        start_hunyuan(self.net, self.latent_channels)

    def _encode(self, video: Tensor) -> Tensor:
        moments: Tensor = self.net.quant_conv(self.net.encoder(video))
        return moments

    def _decode(self, z: Tensor) -> Tensor:
        video: Tensor = self.net.decoder(self.net.post_quant_conv(z))
        return video


def _tilings(config: HunyuanNet) -> tuple[Tiling, Tiling]:
    """Tiles to encode and to decode in, with a quarter of overlap at the published values."""
    time = cut(config.sample_tsize, config.tile_overlap_factor) if config.use_temporal_tiling else None
    plane = cut(config.sample_size, config.tile_overlap_factor) if config.use_spatial_tiling else None
    pixels = Tiling.of((time, plane, plane), SHRINK, causal=True)
    return pixels, pixels.inverse()
