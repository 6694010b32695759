"""Layers of the video DC-AE: residual blocks, linear-attention blocks, and shortcuts that keep the picture.

Letters: B batch, C channels, T frames, H W pixels. Convolutions pad with zeros on every side, in time too: nothing here
is causal. Names of submodules are those of the released weights (om/dc_ae/models/nn/ops.py, main).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS, ATTENTION_EPS = 1e-5, 1e-15
# Hidden width of the gated feed-forward in units of the block's, and taps of the depth-wise mixing of q, k and v.
EXPANSION, MIXING_TAPS = 4, 5

Triple = tuple[int, int, int]


class RMSNorm3d(nn.Module):
    """Every position's channels divided by their root mean square (eps 1e-5), then a weight and a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same; the statistics are taken in fp32."""
        normed = (x / (x.float().square().mean(1, keepdim=True) + NORM_EPS).sqrt()).to(x.dtype)
        return normed * self.weight[:, None, None, None] + self.bias[:, None, None, None]


class ConvLayer(nn.Module):
    """A convolution of `taps` in every axis that keeps the size but for its stride, and what may follow it."""

    def __init__(
        self,
        channels: tuple[int, int],
        taps: int = 3,
        *,
        stride: Triple = (1, 1, 1),
        bias: bool = True,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(*channels, taps, stride, padding=taps // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C',T',H',W']."""
        y: Tensor = self.conv(x)
        return y


class NormedConv(ConvLayer):
    """A convolution without a bias, then the norm: how every residual branch ends."""

    def __init__(self, channels: tuple[int, int], taps: int) -> None:
        super().__init__(channels, taps, bias=False)
        self.norm = RMSNorm3d(channels[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C',T,H,W]."""
        y: Tensor = self.norm(self.conv(x))
        return y


class Residual(nn.Module):
    """The branch `main`, added to its input."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same."""
        y: Tensor = self.main(x) + x
        return y


class ConvBranch(nn.Module):
    """Convolution, SiLU, convolution, norm: the branch of a plain residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer((channels, channels))
        self.conv2 = NormedConv((channels, channels), 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same."""
        y: Tensor = self.conv2(F.silu(self.conv1(x)))
        return y


class LinearAttention(nn.Module):
    """ReLU linear attention over all positions of a clip, at two scales: q, k, v as they are, and mixed depth-wise.

    Each scale has C / `head_dim` heads; softmax-free, so that the cost grows with T H W, not with its square.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, wide = head_dim, 3 * channels
        self.qkv = ConvLayer((channels, wide), 1, bias=False)
        mix = nn.Conv3d(wide, wide, MIXING_TAPS, padding=MIXING_TAPS // 2, groups=wide, bias=False)
        blend = nn.Conv3d(wide, wide, 1, groups=wide // head_dim, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(mix, blend)])
        self.proj = NormedConv((2 * channels, channels), 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same."""
        qkv = self.qkv(x)
        both = torch.cat([qkv, self.aggreg[0](qkv)], dim=1)
        y: Tensor = self.proj(self._attend(both).to(qkv.dtype))
        return y

    def _attend(self, qkv: Tensor) -> Tensor:
        """[B,2*3C,T,H,W], q, k and v of a head side by side -> [B,2C,T,H,W].

        A row of ones under v gives the denominators in the same product. The quotient is taken in fp32, and outside
        autocast: sums over all positions overflow fp16, and eps is far below its smallest number.
        """
        batch, _, *grid = qkv.shape
        with torch.autocast(qkv.device.type, enabled=False):
            if qkv.dtype == torch.float16:
                qkv = qkv.float()
            q, k, v = qkv.reshape(batch, -1, 3 * self.head_dim, qkv[0, 0].numel()).chunk(3, dim=2)
            sums = F.pad(v, (0, 0, 0, 1), value=1.0) @ F.relu(k).transpose(-1, -2) @ F.relu(q)
            sums = sums.float() if sums.dtype == torch.bfloat16 else sums
            return (sums[:, :, :-1] / (sums[:, :, -1:] + ATTENTION_EPS)).reshape(batch, -1, *grid)


class GatedBranch(nn.Module):
    """Widen, mix depth-wise, gate one half by SiLU of the other, narrow, norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.inverted_conv = ConvLayer((channels, 2 * hidden), 1)
        self.depth_conv = ConvLayer((2 * hidden, 2 * hidden), groups=2 * hidden)
        self.point_conv = NormedConv((hidden, channels), 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same."""
        value, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        y: Tensor = self.point_conv(value * F.silu(gate))
        return y


class AttentionBlock(nn.Module):
    """EfficientViT block: attention over the clip, then the gated local branch (`EViTS5_GLU`)."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(channels, head_dim))
        self.local_module = Residual(GatedBranch(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> the same."""
        y: Tensor = self.local_module(self.context_module(x))
        return y


class Down(nn.Module):
    """Half the size by a strided convolution; the shortcut folds blocks of pixels into channels and averages groups.

    `factor` is what (T,H,W) are divided by. A single frame keeps its frame: the shortcut folds it in space only.
    """

    def __init__(self, channels: tuple[int, int], factor: Triple) -> None:
        super().__init__()
        self.out_channels, self.factor = channels[1], factor
        self.main = ConvLayer(channels, stride=factor)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,T,H,W] -> [B,C',T/f,H/2,W/2]."""
        factor = self.factor if x.shape[2] > 1 else (1, *self.factor[1:])
        y: Tensor = self.main(x) + average(unshuffle(x, factor), self.out_channels)
        return y


class Nearest(nn.Module):
    """Every position repeated, then a convolution."""

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        self.conv = ConvLayer(channels)

    def forward(self, x: Tensor, factor: Triple) -> Tensor:
        """[B,C,T,H,W] -> [B,C',f T,2H,2W]."""
        y: Tensor = self.conv(shuffle(x.repeat_interleave(factor[0] * factor[1] * factor[2], dim=1), factor))
        return y


class Up(nn.Module):
    """Twice the size: `Nearest`, and a shortcut that repeats channels and unfolds them into blocks of pixels."""

    def __init__(self, channels: tuple[int, int], factor: Triple) -> None:
        super().__init__()
        self.out_channels, self.factor = channels[1], factor
        self.main = Nearest(channels)

    def forward(self, x: Tensor, clip: bool) -> Tensor:
        """[B,C,T,H,W] -> [B,C',f T,2H,2W]; a single picture (not `clip`) keeps its one frame."""
        factor = self.factor if clip else (1, *self.factor[1:])
        folded = self.out_channels * factor[0] * factor[1] * factor[2]
        y: Tensor = self.main(x, factor) + shuffle(x.repeat_interleave(folded // x.shape[1], dim=1), factor)
        return y


class Stage(nn.Module):
    """Blocks in a row, under the released name of the list."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(blocks)

    def forward(self, x: Tensor, clip: bool = True) -> Tensor:
        """[B,C,T,H,W] through every block; `clip` is for those that enlarge."""
        for block in self.op_list:
            x = block(x, clip) if isinstance(block, Up) else block(x)
        return x


def unshuffle(x: Tensor, factor: Triple) -> Tensor:
    """Blocks of pixels to channels, [B,C,T,H,W] -> [B,C f,...]: C slowest, then the places in a block (t,h,w)."""
    batch, channels, *grid = x.shape
    (time, high, wide), (ft, fh, fw) = (size // by for size, by in zip(grid, factor, strict=True)), factor
    blocks = x.reshape(batch, channels, time, ft, high, fh, wide, fw).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return blocks.reshape(batch, channels * ft * fh * fw, time, high, wide)


def shuffle(x: Tensor, factor: Triple) -> Tensor:
    """Channels to blocks of pixels: the inverse of `unshuffle`."""
    batch, channels, time, high, wide = x.shape
    ft, fh, fw = factor
    blocks = x.reshape(batch, -1, ft, fh, fw, time, high, wide).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return blocks.reshape(batch, channels // (ft * fh * fw), time * ft, high * fh, wide * fw)


def average(x: Tensor, channels: int) -> Tensor:
    """Means of neighbouring channels, so many that `channels` are left: [B,C,T,H,W] -> [B,channels,T,H,W]."""
    return x.reshape(len(x), channels, -1, *x.shape[2:]).mean(2)
