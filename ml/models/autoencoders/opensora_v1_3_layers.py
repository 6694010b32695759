"""The network of OpenSora-VAE 1.3 under its released names: a causal encoder and a heavier decoder (om/vae_v1_3, 1.3).

Letters: B batch, C channels, T frames, H W pixels, t h w latent grid. Zeros are padded in front in time, so that no
frame sees a later one; group norms are taken over the whole clip. The encoder halves height and width three times, and
time with the last two; the decoder doubles all three axes twice and then height and width, and drops the first three
of its 4t frames.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml.architectures import OpenSoraV13Net

NORM_EPS = 1e-6
# Levels (0 is the pixels) after which the encoder halves time, and those after which the decoder doubles it.
HALVE_TIME_AFTER, DOUBLE_TIME_AFTER = (1, 2), (2, 3)
# CUDA's nearest neighbour counts cells in 32 bits; at 720p the decoder has more of them.
MOST_CELLS, CHANNEL_PARTS = 2**31 - 1, 8
# The decoder makes four frames of the first latent, of which only the last is the clip's first frame.
LEADING_FRAMES = 3


class Network(nn.Module):
    """Encoder and decoder; a clip [B,3,T,H,W] with T = 4k+1 becomes moments [B,2C,k+1,H/8,W/8]."""

    def __init__(self, config: OpenSoraV13Net) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)


class Encoder(nn.Module):
    """Clip [B,3,T,H,W] -> mean and log variance [B,2C,t,h,w]."""

    def __init__(self, config: OpenSoraV13Net) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        self.conv_in = _convolution(config, 3, widths[0])
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            blocks = [ResBlock(config, width if j else before, width) for j in range(config.num_res_blocks)]
            step = None if level == len(widths) - 1 else _halving(config, width, level in HALVE_TIME_AFTER)
            self.down.append(Level(blocks, "downsample", step))
        self.mid = Middle(config, widths[-1])
        self.norm_out = nn.GroupNorm(config.num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = _convolution(config, widths[-1], 2 * config.latent_channels)

    def forward(self, video: Tensor) -> Tensor:
        """[B,3,T,H,W] -> [B,2C,t,h,w]."""
        h = self.conv_in(video)
        for level in self.down:
            h = level(h)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return moments


class Decoder(nn.Module):
    """Latent [B,C,t,h,w] -> clip [B,3,4t-3,8h,8w]."""

    def __init__(self, config: OpenSoraV13Net) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        top = len(widths) - 1
        self.conv_in = _convolution(config, config.latent_channels, widths[top])
        self.mid = Middle(config, widths[top])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, top)]
            blocks = [ResBlock(config, width if j else before, width) for j in range(config.num_res_blocks + 1)]
            step = _doubling(config, width, level in DOUBLE_TIME_AFTER) if level else None
            self.up.append(Level(blocks, "upsample", step))
        self.norm_out = nn.GroupNorm(config.num_groups, widths[0], eps=NORM_EPS)
        self.conv_out = SlicedConv3d(widths[0], 3, 3, slice_size=_slice_size(config))

    def forward(self, latent: Tensor) -> Tensor:
        """[B,C,t,h,w] -> [B,3,4t-3,8h,8w]."""
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
        h = F.pad(F.silu(self.norm_out(h)), (1, 1, 1, 1, 2, 0))
        video: Tensor = self.conv_out(h)
        return video[:, :, LEADING_FRAMES:]


class Level(nn.Module):
    """Residual blocks of one resolution, and the step to the next under the name it is given."""

    def __init__(self, blocks: list["ResBlock"], name: str, step: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.step = name if step is not None else None
        if step is not None:
            self.add_module(name, step)

    def forward(self, h: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C',T',H',W']."""
        for block in self.block:
            h = block(h)
        return h if self.step is None else self.get_submodule(self.step)(h)


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest resolution."""

    def __init__(self, config: OpenSoraV13Net, width: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(config, width, width)
        self.attn_1 = Attention(config, width)
        self.block_2 = ResBlock(config, width, width)

    def forward(self, h: Tensor) -> Tensor:
        """[B,C,t,h,w] -> the same shape."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class ResBlock(nn.Module):
    """(norm, SiLU, convolution) twice beside a shortcut, which is a 1x1x1 convolution where the width changes."""

    def __init__(self, config: OpenSoraV13Net, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.num_groups, before, eps=NORM_EPS)
        self.conv1 = _convolution(config, before, after)
        self.norm2 = nn.GroupNorm(config.num_groups, after, eps=NORM_EPS)
        self.conv2 = _convolution(config, after, after)
        self.nin_shortcut = _convolution(config, before, after, kernel=1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """[B,before,T,H,W] -> [B,after,T,H,W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        return out


class Attention(nn.Module):
    """One head over all cells, causal cell by cell in the order frame, row, column (not frame by frame)."""

    def __init__(self, config: OpenSoraV13Net, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, width, eps=NORM_EPS)
        self.q = _convolution(config, width, width, kernel=1)
        self.k = _convolution(config, width, width, kernel=1)
        self.v = _convolution(config, width, width, kernel=1)
        self.proj_out = _convolution(config, width, width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,t,h,w] -> the same shape."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None].contiguous() for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))
        return out


class SlicedConv3d(nn.Conv3d):
    """An unpadded convolution of stride 1 that can work in slices of `slice_size` along the longest axis (exact)."""

    def __init__(self, before: int, after: int, kernel: int, slice_size: int | None) -> None:
        super().__init__(before, after, kernel)
        self.slice_size = slice_size

    def forward(self, x: Tensor) -> Tensor:
        """[B,before,T,H,W] -> [B,after,T-k+1,H-k+1,W-k+1]."""
        if self.slice_size is None:
            return super().forward(x)
        dim = max((2, 3, 4), key=lambda axis: x.shape[axis])
        halo = self.kernel_size[dim - 2] - 1
        size = x.shape[dim] - halo
        starts = range(0, size, self.slice_size)
        slices = [x.narrow(dim, start, min(self.slice_size, size - start) + halo) for start in starts]
        return torch.cat([super(SlicedConv3d, self).forward(part) for part in slices], dim=dim)


class CausalConv3d(nn.Module):
    """Convolution with zeros around in space and only in front in time; `stride` (1 or 2) is that of all three axes."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, slice_size: int | None) -> None:
        super().__init__()
        sliced = SlicedConv3d(before, after, kernel, slice_size)
        self.conv = sliced if stride == 1 else nn.Conv3d(before, after, kernel, stride=stride)
        self.pad = (*[kernel // 2] * 4, kernel - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B,before,T,H,W] -> [B,after,T',H',W'], sizes divided by the stride and rounded up."""
        out: Tensor = self.conv(F.pad(x, self.pad) if any(self.pad) else x)
        return out


class HalvePlane(nn.Module):
    """Halves height and width of every frame; pads one row below and one column at the right."""

    def __init__(self, width: int, micro_batch: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)
        self.micro_batch = micro_batch

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C,T,H/2,W/2]."""
        return _frame_by_frame(x, lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), self.micro_batch)


class HalveAll(nn.Module):
    """Halves time, height and width with one causal convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, stride=2, slice_size=None)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C,(T+1)/2,H/2,W/2]."""
        out: Tensor = self.conv(x)
        return out


class DoublePlane(nn.Module):
    """Doubles height and width of every frame: nearest neighbour, then a 2-D convolution."""

    def __init__(self, width: int, micro_batch: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.micro_batch = micro_batch

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C,T,2H,2W]."""
        return _frame_by_frame(x, lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), self.micro_batch)


class DoubleAll(nn.Module):
    """Doubles time, height and width: nearest neighbour, plus a refinement of itself."""

    def __init__(self, config: OpenSoraV13Net, width: int) -> None:
        super().__init__()
        self.conv3d = Refinement(config, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C,2T,2H,2W]."""
        large = _enlarge(x)
        out: Tensor = self.conv3d(large) + large
        return out


class Refinement(nn.Module):
    """(convolution, norm) twice, SiLU between and after the residual sum; its norms keep PyTorch's epsilon, 1e-5."""

    def __init__(self, config: OpenSoraV13Net, width: int) -> None:
        super().__init__()
        self.conv1 = _convolution(config, width, width)
        self.norm1 = nn.GroupNorm(config.num_groups, width)
        self.conv2 = _convolution(config, width, width)
        self.norm2 = nn.GroupNorm(config.num_groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same shape."""
        h = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(h + x)


def _convolution(config: OpenSoraV13Net, before: int, after: int, kernel: int = 3) -> CausalConv3d:
    return CausalConv3d(before, after, kernel, stride=1, slice_size=_slice_size(config))


def _slice_size(config: OpenSoraV13Net) -> int | None:
    return config.tile_size if config.use_tiled_conv3d else None


def _halving(config: OpenSoraV13Net, width: int, time: bool) -> nn.Module:
    return HalveAll(width) if time else HalvePlane(width, config.micro_batch_size_2d)


def _doubling(config: OpenSoraV13Net, width: int, time: bool) -> nn.Module:
    return DoubleAll(config, width) if time else DoublePlane(width, config.micro_batch_size_2d)


def _enlarge(x: Tensor) -> Tensor:
    """Nearest neighbour, [B,C,T,H,W] -> [B,C,2T,2H,2W]."""
    parts = x.chunk(CHANNEL_PARTS if x.numel() * 8 > MOST_CELLS else 1, dim=1)
    return torch.cat([F.interpolate(part, scale_factor=2.0) for part in parts], dim=1)


def _frame_by_frame(x: Tensor, network: Callable[[Tensor], Tensor], micro_batch: int | None) -> Tensor:
    """Apply a network of pictures [N,C,H,W] to every frame of x [B,C,T,H,W], `micro_batch` of them at a time."""
    frames = x.transpose(1, 2).flatten(0, 1)
    done = torch.cat([network(part) for part in torch.split(frames, micro_batch or len(frames))])
    return done.reshape(x.shape[0], x.shape[2], *done.shape[1:]).transpose(1, 2)
