"""Where training an autoencoder from nothing starts: at the picture made small and large again, not at noise.

The first six channels of every level carry red, green and blue and their negatives. silu(x) - silu(-x) = x, so that the
activations before both output convolutions cancel, and the network begins as a linear map but for the group norms,
which still divide by each clip's deviation: each latent cell holds the mean colour of its pixels. Everything else
starts random, with its input's variance kept and its residual branches and posterior noise off, and is free to learn
the detail. Kernels start with the present frame only, so that zeros before the first frame change nothing. Widths
below six channels start random. Groups of the norms should hold the six channels together.

Measured at the tiny size (8 channels, one block per level, one group) on the held-out last fifth of three clips, at
48x80 pixels and 5 frames, before training and after 75 s of one core, one seed: HunyuanVideo 18.8 and 23.5 dB, against
10.7 and 19.3 dB from PyTorch's own random weights; OpenSora-VAE 1.3 18.6 and 21.0 dB, against 11.3 and 18.0 dB.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ml.models.autoencoders.carry import FIRST_LOGVAR

COLOURS, MIRRORED = 3, 6
# Spread of pixels in [-1, 1]: the group norm before the last convolution divides by it.
PIXEL_STD = 0.5
# Taps along one side of a picture: the mean of the two pixels that become one, and linear interpolation once nearest
# neighbour has made two of one.
HALVE, DOUBLE, KEEP = (0.0, 0.5, 0.5), (0.25, 0.5, 0.25), (0.0, 1.0, 0.0)
# OpenSora-VAE 1.3 halves the plane with no padding before the first pixel, so its pair is the first two taps.
HALVE_UNPADDED = (0.5, 0.5, 0.0)
# 1.3 adds silu(x) to x after doubling time. Small colours and their negatives are apart 3/2 as far after it, so twice
# that is undone where the plane alone is doubled.
SMALL, AFTER_TWO = 0.25, 1.5**2

Pairs = list[tuple[int, int, float]]
SAME: Pairs = [(channel, channel, 1.0) for channel in range(MIRRORED)]
COLOUR: Pairs = SAME[:COLOURS]
MIRROR: Pairs = [*COLOUR, *((COLOURS + c, c, -1.0) for c in range(COLOURS))]
UNMIRROR: Pairs = [pair for c in range(COLOURS) for pair in ((c, c, 1.0), (c, COLOURS + c, -1.0))]


@torch.no_grad()
def start_hunyuan(net: nn.Module, latent_channels: int) -> None:
    """Weights to train the HunyuanVideo network `net` from; nothing is drawn when it is on the meta device."""
    _randomise(net, ends=("conv2.conv", "to_out.0"))
    _quieten(net.get_submodule("quant_conv"), latent_channels)
    if _weight(net, "encoder.conv_in.conv").shape[0] < MIRRORED:
        return
    for name, convolution in _convolutions(net):
        if "conv_shortcut" in name:
            _set(convolution.weight, SAME)
        if "samplers" in name:
            _set(convolution.weight, SAME, HALVE if "downsamplers" in name else DOUBLE)
    for part in ("encoder", "decoder"):
        _set(_weight(net, f"{part}.conv_in.conv"), MIRROR)
        _set(_weight(net, f"{part}.conv_out.conv"), UNMIRROR)
    _weight(net, "decoder.conv_out.conv").mul_(PIXEL_STD)
    for name in ("quant_conv", "post_quant_conv"):
        _set(_weight(net, name), COLOUR)


@torch.no_grad()
def start_opensora_v1_3(net: nn.Module, latent_channels: int) -> None:
    """Weights to train the network of OpenSora-VAE 1.3 `net` from; nothing is drawn on the meta device."""
    _randomise(net, ends=("conv2.conv", "proj_out.conv"))
    for name, module in net.named_modules():
        if name.endswith("conv3d.norm2"):
            nn.init.zeros_(_affine(module).weight)
    _quieten(net.get_submodule("encoder.conv_out.conv"), latent_channels)
    if _weight(net, "encoder.conv_in.conv").shape[0] < MIRRORED:
        return
    for name, convolution in _convolutions(net):
        if "nin_shortcut" in name:
            _set(convolution.weight, SAME)
        if "downsample" in name:
            _set(convolution.weight, SAME, HALVE if convolution.weight.ndim == 5 else HALVE_UNPADDED)
        if "upsample.conv" in name and convolution.weight.ndim == 4:
            _set(convolution.weight, SAME, DOUBLE, 1 / (SMALL * AFTER_TWO))
    _set(_weight(net, "encoder.conv_in.conv"), MIRROR)
    _set(_weight(net, "encoder.conv_out.conv"), UNMIRROR)
    _set(_weight(net, "decoder.conv_in.conv"), MIRROR, gain=SMALL)
    _set(_weight(net, "decoder.conv_out"), UNMIRROR, gain=PIXEL_STD)


def _randomise(net: nn.Module, ends: tuple[str, ...]) -> None:
    """Random convolutions of the present frame that keep their input's variance; the `ends` of branches are zero."""
    for _, convolution in _convolutions(net):
        weight = convolution.weight
        nn.init.zeros_(weight)
        nn.init.kaiming_normal_(weight[:, :, -1] if weight.ndim == 5 else weight, nonlinearity="linear")
        nn.init.zeros_(convolution.bias)
    for name, module in net.named_modules():
        if name.endswith(ends):
            nn.init.zeros_(_affine(module).weight)
            nn.init.zeros_(_affine(module).bias)


def _quieten(convolution: nn.Module, latent_channels: int) -> None:
    """Let the convolution that gives the moments start with almost no noise."""
    _affine(convolution).weight[latent_channels:] = 0.0
    _affine(convolution).bias[latent_channels:] = FIRST_LOGVAR


def _set(weight: Tensor, pairs: Pairs, taps: tuple[float, float, float] = KEEP, gain: float = 1.0) -> None:
    """Let channel `out` of a kernel [out,in,(t,)h,w] be gain x the sum of sign x channel `in` over its pairs.

    `taps` are those of height and of width, for kernels of 3 (a kernel of 1 keeps). Only the last tap in time is
    used: padding is causal, so it is the present frame.
    """
    kernel = weight if weight.ndim == 5 else weight[:, :, None]
    line = kernel.new_tensor(taps if kernel.shape[3] == len(taps) else (1.0,))
    for out, _, _ in pairs:
        weight[out] = 0.0
    for out, source, sign in pairs:
        kernel[out, source, -1] = torch.outer(line, line) * (sign * gain)


def _convolutions(net: nn.Module) -> Iterable[tuple[str, Any]]:
    return [(name, module) for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]


def _affine(module: nn.Module) -> Any:
    """A module with weight and bias, which its type does not say."""
    return module


def _weight(net: nn.Module, name: str) -> Tensor:
    weight: Tensor = _affine(net.get_submodule(name)).weight
    return weight
