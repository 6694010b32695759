"""The autoencoder of Stable Diffusion on every frame, which Open-Sora 1.0 and 1.1 use (om/vae/vae.py, 1.0 and 1.1).

Letters: B batch, C latent channels, T frames, H W pixels, h w latent grid; h = H/8, w = W/8, and time is not
compressed. The network is diffusers' `AutoencoderKL`; its frames are independent. Videos are in [-1, 1].
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ml.architectures import Latent, OpenSoraV12Net, StableDiffusionNet
from ml.models.autoencoders import carry
from ml.models.autoencoders.autoencoder import Part, VideoAutoencoder, draw
from ml.models.autoencoders.original_names import read

# Latents of Stable Diffusion times this have about unit spread (Rombach et al. 2022, app. G; 1.0 to 1.2 use it).
SCALE = 0.18215
SPATIAL_STRIDE = 8
# Frames larger than this are tiled when tiling is on, with a quarter of overlap: the size SD was trained at.
TILE_PX, TILE_OVERLAP = 512, 0.25
COLOURS = 3
# Names that files saved before diffusers 0.18 have (stabilityai/sd-vae-ft-ema among them), and their present ones.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class StableDiffusionAutoencoder(VideoAutoencoder):
    """Per-frame autoencoder; `net` is diffusers' `AutoencoderKL`. Without a `latent` the released scale 0.18215 holds.

    `micro_batch_size` frames are encoded or decoded at a time, which bounds memory and changes no result. Fields may
    have the names of Open-Sora's `VideoAutoencoderKL` (original_names.py).
    """

    least_side_px = SPATIAL_STRIDE
    released_prefix = "module."

    def __init__(self, net: StableDiffusionNet | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        given = read(StableDiffusionNet, net, hyper)
        self.config = given.net
        self.latent = latent or given.latent or Latent(scale=SCALE)
        self.latent_channels = self.config.latent_channels
        self.temporal_stride, self.spatial_stride = 1, SPATIAL_STRIDE
        self.net = kl_network(self.config)
        self.tile(False)

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of raw z, both [B,C,T,h,w], h and w rounded down; ValueError below 8 pixels."""
        self.admit(video)
        return encode_frames(self.net, video, self.config.micro_batch_size)

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,T,h,w]."""
        return decode_frames(self.net, z, self.config.micro_batch_size)

    def latent_frames(self, frames: int) -> int:
        """Every frame has its latent; ValueError below one frame."""
        if frames < 1:
            raise ValueError(f"cannot encode {frames} frames: a clip has at least one")
        return frames

    def tile(self, enabled: bool) -> None:
        """Switch tiling of frames above 512 px, in blended tiles."""
        tile_frames(self.net, enabled)

    def initialise(self) -> None:
        """Weights to train a small network from: the mean colours of 8x8 pixels; see the function of this name."""
        initialise(self.net, self.latent_channels)

    def train_only(self, part: Part) -> None:
        """Choose what trains: "all" and "spatial" are both the whole network; ValueError for "temporal"."""
        if part == "temporal":
            raise ValueError("the Stable Diffusion autoencoder has no temporal part: train 'all' or 'spatial'")
        self.net.requires_grad_(True)


def kl_network(config: StableDiffusionNet | OpenSoraV12Net) -> nn.Module:
    """diffusers' `AutoencoderKL` of this size; it loads files under the present and the deprecated attention names."""
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL  # untyped
    levels = len(config.block_out_channels)
    net: nn.Module = build(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=SCALE,
    )
    hook: Callable[..., Any] = net.register_load_state_dict_pre_hook
    hook(_rename_deprecated)
    return net


def encode_frames(net: nn.Module, video: Tensor, micro_batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Mean and log variance of raw z of every frame, both [B,C,T,h,w], of a video [B,3,T,H,W]."""
    mean, logvar = zip(*_posteriors(net, video, micro_batch_size), strict=True)
    return _clip(mean, len(video)), _clip(logvar, len(video))


def sample_frames(
    net: nn.Module, video: Tensor, micro_batch_size: int | None, generator: torch.Generator | None
) -> Tensor:
    """A posterior sample of raw z of every frame, [B,C,T,h,w], drawn micro batch by micro batch as in the original."""
    posteriors = _posteriors(net, video, micro_batch_size)
    return _clip([draw(mean, logvar, generator) for mean, logvar in posteriors], len(video))


def decode_frames(net: nn.Module, z: Tensor, micro_batch_size: int | None) -> Tensor:
    """Video [B,3,T,H,W] of raw z [B,C,T,h,w]."""
    decode: Callable[..., tuple[Tensor]] = net.decode  # type: ignore[assignment]  # diffusers is untyped
    return _clip([decode(part, return_dict=False)[0] for part in _frames(z, micro_batch_size)], len(z))


def tile_frames(net: Any, enabled: bool) -> None:
    """Switch diffusers' tiling: frames above 512 px are cut into tiles with a quarter of overlap, blended linearly."""
    net.tile_sample_min_size, net.tile_latent_min_size = TILE_PX, TILE_PX // SPATIAL_STRIDE
    net.tile_overlap_factor, net.use_tiling = TILE_OVERLAP, enabled


@torch.no_grad()
def initialise(net: nn.Module, latent_channels: int) -> None:
    """Weights to train an `AutoencoderKL` from nothing: it starts as the picture made small and large again.

    Each latent cell's first three channels are the mean colour of its 8x8 pixels; the rest of the network is random
    with its residual branches and its posterior noise off (see carry.py). Nothing is drawn on the meta device.
    """
    carry.soften(net)
    for name, module in net.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            _silence(module)
    carry.quiet(net.get_submodule("quant_conv"), latent_channels)
    for side in ("encoder", "decoder"):
        _carry_colours(net.get_submodule(side), latent_channels)
    for name in ("quant_conv", "post_quant_conv"):
        for channel in range(min(COLOURS, latent_channels)):
            carry.connect(net.get_submodule(name), channel, channel, 1.0)


def _carry_colours(side: nn.Module, latent_channels: int) -> None:
    norm: Any = side.get_submodule("conv_norm_out")
    convolutions = [(name, m) for name, m in side.named_modules() if isinstance(m, nn.Conv2d)]
    width = min(module.out_channels for name, module in convolutions if name != "conv_out")
    lanes = carry.lanes(min(COLOURS, latent_channels), norm.num_channels // norm.num_groups, width)
    if lanes is None:
        return
    for name, module in convolutions:
        if "samplers" in name or "conv_shortcut" in name:
            carry.keep(module, lanes, _block_mean(module.weight) if "downsamplers" in name else None)
    carry.scatter(side.get_submodule("conv_in"), lanes)
    carry.gather(side.get_submodule("conv_out"), lanes)


def _block_mean(weight: Tensor) -> Tensor:
    """Mean of a 2x2 block: diffusers pads right and below only, so the first two taps are the block."""
    half = weight.new_tensor((0.5, 0.5, 0.0))
    return torch.outer(half, half)


def _silence(module: Any) -> None:
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)


def _posteriors(net: nn.Module, video: Tensor, size: int | None) -> Iterable[tuple[Tensor, Tensor]]:
    encode: Callable[..., tuple[Any]] = net.encode  # type: ignore[assignment]  # diffusers is untyped
    for part in _frames(video, size):
        posterior = encode(part, return_dict=False)[0]
        yield posterior.mean, posterior.logvar


def _frames(clip: Tensor, size: int | None) -> tuple[Tensor, ...]:
    frames = rearrange(clip, "b c t h w -> (b t) c h w")
    return torch.split(frames, size or len(frames))


def _clip(frames: Iterable[Tensor], batch: int) -> Tensor:
    return rearrange(torch.cat(list(frames)), "(b t) c h w -> b c t h w", b=batch)


def _rename_deprecated(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and ".attentions." in name]:
        present = name
        for old, new in RENAMED.items():
            present = present.replace(old, new)
        state[present] = state.pop(name)
