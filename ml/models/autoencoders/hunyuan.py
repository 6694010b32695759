"""The causal autoencoder of HunyuanVideo, which Open-Sora 2.0 uses: diffusers' network, the house's interface.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid, t = (T-1)/4 + 1, h = H/8, w = W/8.
Convolutions, padding and attention are causal, so a picture is a clip of one frame; group norms are taken over the
whole clip, so the first latent of a clip is near, not equal to, that of its first frame alone.

Diffusers' layers and Open-Sora's (om/hunyuan_vae, main) have the same names, shapes and results. Only their tiles
differ: ours are cut and blended as Open-Sora 2.0 does, also by 64 frames where diffusers takes 16.
"""

from fractions import Fraction
from typing import Any

from torch import Tensor

from ml.architectures import HunyuanNet, Latent
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.start import start_hunyuan
from ml.models.autoencoders.tiles import Tiling, tiled

TEMPORAL_STRIDE, SPATIAL_STRIDE = 4, 8
# Open-Sora 2.0 tiles above 256 px and 64 frames, with a quarter of overlap (om/hunyuan_vae, main).
ENCODE = Tiling((64, 256, 256), (16, 64, 64), (Fraction(1, 4), Fraction(1, 8), Fraction(1, 8)), causal=True)
DECODE = Tiling((16, 32, 32), (4, 8, 8), (4, 8, 8), causal=True)
# Log variances are clipped to this range (om/hunyuan_vae/vae.py, main).
LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


class HunyuanAutoencoder(VideoAutoencoder):
    """The released network (`net`, 246M parameters at the default size) from a config or its fields."""

    net: Any  # diffusers' classes are untyped

    def __init__(self, net: HunyuanNet | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        from diffusers import AutoencoderKLHunyuanVideo

        config = net or HunyuanNet(**hyper)
        self.config = config
        self.latent = latent or Latent()
        self.latent_channels = config.latent_channels
        self.temporal_stride, self.spatial_stride = TEMPORAL_STRIDE, SPATIAL_STRIDE
        build: Any = AutoencoderKLHunyuanVideo  # untyped
        self.net = build(
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
        )
        self._tiled = False

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z, both [B,C,t,h,w]; raises ValueError when strides do not fit."""
        self.latent_shape(*video.shape[2:])
        moments = tiled(self._encode, video, ENCODE) if self._tiled else self._encode(video)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; raises ValueError when T frames do not have t latents."""
        if self.latent_frames(frames) != z.shape[2]:
            wanted = self.latent_frames(frames)
            raise ValueError(f"cannot decode {z.shape[2]} latents to {frames} frames, which have {wanted}")
        return tiled(self._decode, z, DECODE) if self._tiled else self._decode(z)

    def latent_frames(self, frames: int) -> int:
        """(T-1)/4 + 1; raises ValueError with the nearest lengths when T is not 4k+1."""
        steps, rest = divmod(frames - 1, TEMPORAL_STRIDE)
        if rest or frames < 1:
            low = steps * TEMPORAL_STRIDE + 1
            nearest = f"{low} or {low + TEMPORAL_STRIDE}" if low > 0 else "1"
            raise ValueError(f"cannot encode {frames} frames: they must be 4k+1, and the nearest such is {nearest}")
        return steps + 1

    def tile(self, enabled: bool) -> None:
        """Switch tiles of 64 frames and 256 px: larger inputs change a little, others not."""
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
