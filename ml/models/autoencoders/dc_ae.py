"""The video DC-AE of Open-Sora 2.0, `dc-ae-f32t4c128`: 4x32x32 pixels to a cell of 128 channels, without a posterior.

Letters: B batch, C latent channels, T frames, H W pixels, t h w latent grid, t = T/4 (a picture: 1), h = H/32,
w = W/32. Videos are in [-1, 1]. Names of parameters are the released ones (om/dc_ae/models/dc_ae.py, main). The
original gives one frame for any latent of one frame, so that a clip of four comes back as a picture; so it is here
unless frames are asked for. Where the last tile in time has one latent, the original's clip ends short, and ours does
not. Latents of generation are divided by 0.493 (cfg/diffusion/train/high_compression.py, main):
`Latent(std=(0.493,))`.
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ml.architectures import DCAENet, Latent
from ml.models.autoencoders.autoencoder import Part, VideoAutoencoder
from ml.models.autoencoders.dc_ae_layers import (
    AttentionBlock,
    ConvBranch,
    ConvLayer,
    Down,
    Nearest,
    Residual,
    RMSNorm3d,
    Stage,
    Triple,
    Up,
    average,
)
from ml.models.autoencoders.original_names import read
from ml.models.autoencoders.tiles import Tiling, cut, tiled

STRIDES: Triple = (4, 32, 32)
SHRINK = (Fraction(1, 4), Fraction(1, 32), Fraction(1, 32))
LAST = "decoder.project_out.op_list.2.conv.weight"

# Where training from nothing starts: how strong colours and the constant beside them are, and what else is drawn.
COLOURS, CARRIED = 3, 7
COLOUR_GAIN, CONSTANT = 0.5, 1.0
BRANCH_STD, BRANCH_GAIN = 0.005, 0.03


class DCAutoencoder(VideoAutoencoder):
    """Encoder and decoder of `net` (hyper-parameters may be given by name instead: `DCAutoencoder(widths=...)`).

    Fields may have the names of `DC_AE` and `DCAEConfig` (original_names.py). Raises ValueError for tiles that are no
    whole number of latent cells.
    """

    net: "Network"

    def __init__(self, net: DCAENet | None = None, latent: Latent | None = None, **hyper: Any) -> None:
        super().__init__()
        given = read(DCAENet, net, hyper)
        self.config = given.net
        self.latent = latent or given.latent or Latent()
        self.latent_channels = self.config.latent_channels
        self.temporal_stride, self.spatial_stride = STRIDES[0], STRIDES[1]
        self.net = Network(self.config)
        self._tilings = _tilings(self.config)
        self.tiling = False

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw z of a video [B,3,T,H,W], [B,C,t,h,w], and None; ValueError when strides do not fit."""
        self.latent_shape(*video.shape[2:])
        if not self.tiling:
            return self.net.encoder(video), None
        return tiled(self.net.encoder, video, self._tilings[0]), None

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        """Video [B,3,T,H,W] of raw z [B,C,t,h,w]; `frames` tells a picture (1) from a clip of four where t is 1."""
        if self.latent_frames(frames) != z.shape[2]:
            raise ValueError(f"{frames} frames have {self.latent_frames(frames)} latent frames, not {z.shape[2]}")
        if frames == 2:
            raise ValueError("cannot decode 2 frames, which are encoded as a picture: ask for 1, or for 4")

        def decode(part: Tensor) -> Tensor:
            video: Tensor = self.net.decoder(part, clip=frames > 1)
            return video

        if not self.tiling:
            return decode(z)
        return tiled(decode, z, self._tilings[1])

    def latent_frames(self, frames: int) -> int:
        """1 for a picture or two frames, T/4 for a clip; ValueError for any other T, naming the nearest that fit."""
        if frames in (1, 2):
            return 1
        if frames < 1 or frames % self.temporal_stride:
            below = frames // self.temporal_stride * self.temporal_stride
            nearest = f"{max(below, 1)} or {max(below, 0) + self.temporal_stride}"
            raise ValueError(
                f"cannot encode {frames} frames: DC-AE takes 1 or multiples of {self.temporal_stride}; so {nearest}"
            )
        return frames // self.temporal_stride

    def shown(self, latent_frames: int) -> int:
        """A picture of one latent frame, clips of more."""
        return 1 if latent_frames == 1 else self.longest(latent_frames)

    def tile(self, enabled: bool) -> None:
        """Switch tiles, in space and in time as the hyper-parameters say; needed for large videos on any device."""
        self.tiling = enabled

    def train_only(self, part: Part) -> None:
        """The whole network trains (`all`); raises ValueError for parts that it does not have."""
        if part != "all":
            raise ValueError(f"DC-AE has one part: train 'all' of it, not {part!r}")
        self.requires_grad_(True)

    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution, where the adversarial term is weighed against the others."""
        return self.net.get_parameter(LAST)

    @torch.no_grad()
    def initialise(self) -> None:
        """Weights to train from: a fresh network gives the mean colour of each latent cell, blocks of 4x32x32.

        The shortcuts alone carry it: with every width and C a multiple of the narrowest, they average a channel over
        the cell and copy it back. Six carry red, green, blue and their negatives, which the last ReLU and the
        difference after it put together again; the others get a constant before the last norm, so that it divides by
        about the same number everywhere. What is not shortcut starts weak: deviations of norm weights are a quarter
        of the original's 0.02 (om/dc_ae/utils/init.py). Nets with fewer than seven such channels start random.

        Measured at 0.4M parameters, 120 steps (learning rate 3e-4, blurred noise of 64 px): L1 0.20 before and 0.11
        after, against 0.37 and 0.27 from random weights (learning rate 1e-3).
        """
        branches: list[ConvLayer] = []
        for module in self.modules():
            if isinstance(module, RMSNorm3d):
                nn.init.trunc_normal_(module.weight, std=BRANCH_STD)
            elif isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Down | Nearest):
                branches.append(module.main if isinstance(module, Down) else module.conv)
        for branch in branches:
            branch.conv.weight.mul_(BRANCH_GAIN)
        if self.net.decoder.carriers >= CARRIED:
            self.net.encoder.carry_colours()
            self.net.decoder.carry_colours()


class Network(nn.Module):
    """Encoder and decoder, under the released names."""

    def __init__(self, config: DCAENet) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)


class Encoder(nn.Module):
    """Video [B,3,T,H,W] to raw z [B,C,t,h,w]: six stages, five halvings; the last shortcut averages channels."""

    def __init__(self, config: DCAENet) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.carriers = _carriers(config)
        self.project_in = ConvLayer((3, widths[0]))
        stages = []
        for index, depth in enumerate(config.encoder_depths):
            blocks = list(_blocks(config, index, depth))
            if index < last:
                blocks.append(Down((widths[index], widths[index + 1]), _factor(config, index)))
            stages.append(Stage(*blocks))
        self.stages = nn.ModuleList(stages)
        self.project_out = ProjectOut((widths[-1], config.latent_channels))

    def forward(self, video: Tensor) -> Tensor:
        """[B,3,T,H,W] -> [B,C,t,h,w]."""
        x = self.project_in(video)
        for stage in self.stages:
            x = stage(x)
        z: Tensor = self.project_out(x)
        return z

    @torch.no_grad()
    def carry_colours(self) -> None:
        """The first channels take red, green and blue and their negatives from the pixel itself."""
        self.get_parameter("project_out.main.op_list.0.conv.weight").mul_(BRANCH_GAIN)
        weight = self.project_in.conv.weight
        share = len(weight) // self.carriers
        weight.mul_(BRANCH_GAIN)
        weight[: 2 * COLOURS * share] = 0.0
        for channel in range(2 * COLOURS * share):
            colour, sign = channel // share % COLOURS, 1.0 if channel < COLOURS * share else -1.0
            weight[channel, colour, 1, 1, 1] = COLOUR_GAIN * sign


class Decoder(nn.Module):
    """Raw z [B,C,t,h,w] to video [B,3,T,H,W]: the stages backwards, each enlarging before its blocks."""

    def __init__(self, config: DCAENet) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.carriers = _carriers(config)
        self.project_in = ProjectIn((config.latent_channels, widths[-1]))
        stages = []
        for index, depth in enumerate(config.decoder_depths):
            enlarge = [Up((widths[index + 1], widths[index]), _factor(config, index))] if index < last else []
            stages.append(Stage(*enlarge, *_blocks(config, index, depth)))
        self.stages = nn.ModuleList(stages)
        self.project_out = Stage(RMSNorm3d(widths[0]), nn.ReLU(), ConvLayer((widths[0], 3)))

    def forward(self, z: Tensor, clip: bool) -> Tensor:
        """[B,C,t,h,w] -> [B,3,T,H,W]; a picture (not `clip`) has one frame, a clip 4 t."""
        x = self.project_in(z)
        for stage in reversed(self.stages):
            x = stage(x, clip)
        video: Tensor = self.project_out(x)
        return video

    @torch.no_grad()
    def carry_colours(self) -> None:
        """Constants beside the colours, and what the last norm and ReLU make of them put together again."""
        self.project_in.main.conv.weight.mul_(BRANCH_GAIN)
        # The bias that the very last residual branch ends with: no other layer sees the constant.
        bias = [module.bias for module in self.stages[0].modules() if isinstance(module, RMSNorm3d)][-1]
        bias[2 * COLOURS * (len(bias) // self.carriers) :] = CONSTANT
        self.get_parameter("project_out.op_list.0.weight").fill_(1.0)
        weight = self.get_parameter("project_out.op_list.2.conv.weight").zero_()
        share = weight.shape[1] // self.carriers
        # The last norm divides by about the constant's part of the root mean square.
        rms = CONSTANT * (1 - 2 * COLOURS / self.carriers) ** 0.5
        for channel in range(2 * COLOURS * share):
            colour, sign = channel // share % COLOURS, 1.0 if channel < COLOURS * share else -1.0
            weight[colour, channel, 1, 1, 1] = sign * rms / COLOUR_GAIN / share


class ProjectOut(nn.Module):
    """To the latent: a convolution, and beside it the means of neighbouring channels."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        self.main = Stage(ConvLayer(channels))
        self.out_channels = channels[1]

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,t,h,w] -> [B,C',t,h,w]."""
        y: Tensor = self.main(x) + average(x, self.out_channels)
        return y


class ProjectIn(nn.Module):
    """From the latent: a convolution, and beside it every channel repeated."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        self.main = ConvLayer(channels)
        self.repeats = channels[1] // channels[0]

    def forward(self, z: Tensor) -> Tensor:
        """[B,C,t,h,w] -> [B,C',t,h,w]."""
        y: Tensor = self.main(z) + z.repeat_interleave(self.repeats, dim=1)
        return y


def _tilings(config: DCAENet) -> tuple[Tiling, Tiling]:
    """Tiles to encode and to decode in."""
    time = cut(config.temporal_tile_size, config.tile_overlap_factor) if config.use_temporal_tiling else None
    plane = cut(config.spatial_tile_size, config.tile_overlap_factor) if config.use_spatial_tiling else None
    pixels = Tiling.of((time, plane, plane), SHRINK)
    return pixels, pixels.inverse()


def _blocks(config: DCAENet, stage: int, depth: int) -> Iterable[nn.Module]:
    width = config.widths[stage]
    attends = stage >= len(config.widths) - config.num_vit_stages
    for _ in range(depth):
        yield AttentionBlock(width, config.attention_head_dim) if attends else Residual(ConvBranch(width))


def _factor(config: DCAENet, stage: int) -> Triple:
    return (2 if config.temporal_downsample[stage] else 1, 2, 2)


def _carriers(config: DCAENet) -> int:
    """Channels that the shortcuts carry apart from each other: the narrowest width, where it divides all others."""
    everywhere = (*config.widths, config.latent_channels)
    narrowest = min(everywhere)
    return narrowest if all(width % narrowest == 0 for width in everywhere) else 0
