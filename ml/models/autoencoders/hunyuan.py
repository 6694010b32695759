"""The causal video autoencoder of HunyuanVideo, which Open-Sora 2.0 uses: diffusers' network, the house's interface.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid, t = (T-1)/4 + 1, h = H/8, w = W/8.
Convolutions, padding and attention are causal, so a picture is a clip of one frame; group norms are taken over the
whole clip, so the first latent of a clip is near, not equal to, that of its first frame alone. Videos are in [-1, 1].
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml import sections
from ml.models.autoencoders.start import initialise
from ml.models.weights import Card, CheckpointMismatch, Origin, check_card, load_state, read_card, save_weights

# Open-Sora 2.0 tiles above 256 px and 64 frames, with a quarter of overlap (om/hunyuan_vae, main).
TILE_PX, TILE_FRAMES, TILE_OVERLAP = 256, 64, 0.25


class VideoAutoencoder(nn.Module):
    """Encoder and decoder; `scale` multiplies latents, so that their standard deviation is about 1."""

    def __init__(self, section: sections.Autoencoder) -> None:
        super().__init__()
        from diffusers import AutoencoderKLHunyuanVideo

        self.section = section
        self.scale = 1.0 if section.scale is None else section.scale
        build: Any = AutoencoderKLHunyuanVideo  # untyped
        self.net = build(
            latent_channels=section.latent_channels,
            block_out_channels=section.channels,
            layers_per_block=section.layers_per_block,
            norm_num_groups=section.norm_groups,
            scaling_factor=self.scale,
            spatial_compression_ratio=section.spatial_stride,
            temporal_compression_ratio=section.temporal_stride,
        )
        self.tile(False)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Training form: video [B,3,T,H,W] -> (reconstruction of a posterior sample, mean, log variance), unscaled."""
        mean, logvar = self.posterior(video)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        reconstruction: Tensor = self.net.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
        return reconstruction, mean, logvar

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, both [B,C,t,h,w], before scaling; raises ValueError when strides do not fit."""
        self.latent_shape(*video.shape[2:])
        posterior = self.net.encode(video, return_dict=False)[0]
        return posterior.mean, posterior.logvar

    def encode(self, video: Tensor) -> Tensor:
        """Latent of a video [B,3,T,H,W] in [-1,1]: posterior mean times scale, [B,C,t,h,w]."""
        return self.posterior(video)[0] * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Video [B,3,T,H,W] of a scaled latent [B,C,t,h,w]; values may leave [-1,1] a little: clamp before saving."""
        video: Tensor = self.net.decode(latent / self.scale, return_dict=False)[0]
        return video

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of a clip; raises ValueError when the strides do not divide it."""
        temporal, spatial = self.section.temporal_stride, self.section.spatial_stride
        if (frames - 1) % temporal or height % spatial or width % spatial:
            raise ValueError(
                f"cannot encode {frames} frames of {height}x{width}: frames must be {temporal}k+1, "
                f"height and width multiples of {spatial}"
            )
        return self.section.latent_channels, (frames - 1) // temporal + 1, height // spatial, width // spatial

    def tile(self, enabled: bool) -> None:
        """Switch tiling: large inputs are cut into blended tiles, which bounds memory and changes results a little."""
        stride = 1 - TILE_OVERLAP
        self.net.enable_tiling(
            tile_sample_min_height=TILE_PX,
            tile_sample_min_width=TILE_PX,
            tile_sample_min_num_frames=TILE_FRAMES,
            tile_sample_stride_height=int(TILE_PX * stride),
            tile_sample_stride_width=int(TILE_PX * stride),
            tile_sample_stride_num_frames=int(TILE_FRAMES * stride),
        )
        self.net.use_tiling = self.net.use_framewise_encoding = self.net.use_framewise_decoding = enabled


def build_autoencoder(section: sections.Autoencoder) -> VideoAutoencoder:
    """The autoencoder of a recipe, randomly initialised (seed torch first), or empty under `torch.device("meta")`."""
    autoencoder = VideoAutoencoder(section)
    initialise(autoencoder.net, section.latent_channels)
    return autoencoder


def save_autoencoder(
    folder: Path, autoencoder: VideoAutoencoder, origin: Origin, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the weights under the released names, or `state` (an EMA of the same names), with the scale in the card."""
    card = _card(autoencoder.section, origin, autoencoder.scale)
    save_weights(folder, autoencoder.net.state_dict() if state is None else state, card)


def load_autoencoder(
    folder: Path, section: sections.Autoencoder | None = None, recipe: str | None = None
) -> VideoAutoencoder:
    """The autoencoder of a weights folder, with its measured scale.

    Raises CheckpointMismatch when it is no autoencoder, or not of the section and recipe id given.
    """
    card = read_card(folder)
    if card.kind != "hunyuan":
        raise CheckpointMismatch(f"{folder} belongs to another network: kind is {card.kind!r}, wanted 'hunyuan'")
    if section is not None:
        check_card(folder, card, _card(section, Origin(recipe or card.origin.recipe, card.origin.stage), card.scale))
    described = {**card.config, "scale": card.scale, "weights_uri": None, "stages": ()}
    autoencoder = build_autoencoder(sections.Autoencoder.model_validate(described))
    autoencoder.net.load_state_dict(load_state(folder))
    return autoencoder


def load_released(section: sections.Autoencoder, path: Path) -> VideoAutoencoder:
    """The autoencoder with the weights of one safetensors file under the released names (`hunyuan_vae.safetensors`).

    Raises CheckpointMismatch when names or shapes differ.
    """
    from safetensors.torch import load_file

    autoencoder = build_autoencoder(section)
    try:
        autoencoder.net.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointMismatch(f"{path} does not fit the autoencoder of the recipe: {error}") from error
    return autoencoder


def _card(section: sections.Autoencoder, origin: Origin, scale: float | None) -> Card:
    config: dict[str, Any] = section.model_dump(mode="json", exclude={"scale", "weights_uri", "stages"})
    return Card("hunyuan", config, origin, scale)
