"""The temporal half of OpenSora-VAE 1.2, after MAGVIT-v2's (om/vae/vae_temporal.py, 1.2): names, pads and order.

Letters: B batch, C channels, T frames, t latent frames, h w latent grid (space is not compressed here). Convolutions
see the past only; group norms are taken over all frames of the input.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ml.architectures import OpenSoraV12Net

# Bounds of a log variance (om/vae/utils.py, 1.2), those of diffusers.
LOGVAR = (-30.0, 20.0)


class CausalConv3d(nn.Module):
    """Convolution [B,C,T,h,w] with a cubic kernel and a stride in time; zeros go before the first frame."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, (stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The convolved input; T is divided by the stride, rounded up."""
        out: Tensor = self.conv(F.pad(x, self.padding))
        return out


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and the input added; a 1x1x1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3, bias=False)
        if channels_in != channels_out:
            self.conv3 = CausalConv3d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same T, h, w."""
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        out: Tensor = branch + (self.conv3(x) if hasattr(self, "conv3") else x)
        return out


class Encoder(nn.Module):
    """[B,C,T,h,w] to the 2C moments [B,2C,t,h,w]."""

    def __init__(self, config: OpenSoraV12Net) -> None:
        super().__init__()
        widths = _widths(config)
        befores = (config.filters, *widths[:-1])
        self.conv_in = CausalConv3d(config.latent_channels, config.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(_chain(a, b, config) for a, b in zip(befores, widths, strict=True))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, stride=2) if down else nn.Identity()
            for width, down in zip(widths, config.temporal_downsample, strict=False)
        )
        self.res_blocks = _chain(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Moments of a latent clip whose T is a multiple of the stride."""
        x = self.conv_in(x)
        for blocks, down in zip(self.block_res_blocks, (*self.conv_blocks, nn.Identity()), strict=True):
            x = down(_through(blocks, x))
        x = _through(self.res_blocks, x)
        out: Tensor = self.conv2(F.silu(self.norm1(x)))
        return out


class Decoder(nn.Module):
    """[B,C,t,h,w] to [B,C,T,h,w]; time grows by channels that are frames."""

    def __init__(self, config: OpenSoraV12Net) -> None:
        super().__init__()
        widths = _widths(config)
        befores = (*widths[1:], widths[-1])
        self.conv1 = CausalConv3d(config.latent_channels, widths[-1], 3)
        self.res_blocks = _chain(widths[-1], widths[-1], config)
        self.block_res_blocks = nn.ModuleList(_chain(a, b, config) for a, b in zip(befores, widths, strict=True))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if up else nn.Identity()
            for width, up in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.latent_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """The rebuilt latent clip, its pad frames still in front."""
        x = _through(self.res_blocks, self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[level], x)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = rearrange(self.conv_blocks[level - 1](x), "b (c frame) t h w -> b c (t frame) h w", frame=2)
        out: Tensor = self.conv_out(F.silu(self.norm1(x)))
        return out


class TemporalAutoencoder(nn.Module):
    """`VAE_Temporal` of 1.2 on clips of at most one micro frame: zeros fill T up in front to a multiple of `stride`."""

    def __init__(self, config: OpenSoraV12Net) -> None:
        super().__init__()
        self.stride: int = 2 ** sum(config.temporal_downsample)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = CausalConv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B,C,t,h,w] of per-frame latents [B,C,T,h,w]; t = T / stride, rounded up."""
        x = F.pad(x, (0, 0, 0, 0, self.padding(x.shape[2]), 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Per-frame latents [B,C,T,h,w] of z [B,C,t,h,w], T = `num_frames`: the pad is cut off again."""
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, self.padding(num_frames) :]

    def padding(self, frames: int) -> int:
        """Zero frames before a clip of so many."""
        return -frames % self.stride


def _widths(config: OpenSoraV12Net) -> tuple[int, ...]:
    return tuple(config.filters * multiplier for multiplier in config.channel_multipliers)


def _chain(channels_in: int, channels_out: int, config: OpenSoraV12Net) -> nn.ModuleList:
    befores = (channels_in, *(channels_out,) * (config.num_res_blocks - 1))
    return nn.ModuleList(ResBlock(before, channels_out, config.num_groups) for before in befores)


def _through(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x
