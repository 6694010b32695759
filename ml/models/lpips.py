"""LPIPS, the learned perceptual distance between pictures, on AlexNet (to judge) or VGG16 (to train against).

Letters: N pictures, C channels, H W pixels. Features of five layers, each pixel's vector made unit length, squared
difference weighted per channel by a trained head, averaged over pixels, summed over layers (arXiv 1801.03924).

A weights file (safetensors) holds `features.{i}.weight` and `features.{i}.bias` of the convolutions in order, and
`heads.{j}.weight` [C] of the five heads. Five convolutions are AlexNet, thirteen VGG16.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The means and deviations of LPIPS's scaling layer, for pictures in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# Convolutions of each tapped layer: (output channels, kernel, stride, padding); a max-pool stands between some layers.
ALEXNET = (((64, 11, 4, 2),), ((192, 5, 1, 2),), ((384, 3, 1, 1),), ((256, 3, 1, 1),), ((256, 3, 1, 1),))
VGG16 = tuple(((width, 3, 1, 1),) * depth for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
POOLS = {"alex": ((1, 3, 2), (2, 3, 2)), "vgg": tuple((layer, 2, 2) for layer in range(1, 5))}
LAYERS = {"alex": ALEXNET, "vgg": VGG16}


class LpipsError(ValueError):
    """LPIPS weights that are missing or do not fit, with what to do."""


class Lpips(nn.Module):
    """The distance; `kind` is `alex` or `vgg`. Frozen: gradients flow to the pictures, not to the weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.pools = {layer: (kernel, stride) for layer, kernel, stride in POOLS[kind]}
        self.depths = [len(layer) for layer in LAYERS[kind]]
        self.features, channels = nn.ModuleList(), 3
        for width, kernel, stride, padding in (conv for layer in LAYERS[kind] for conv in layer):
            self.features.append(nn.Conv2d(channels, width, kernel, stride, padding))
            channels = width
        self.heads = nn.ModuleList(Head(layer[-1][0]) for layer in LAYERS[kind])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Distances [N] of two batches of pictures [N,3,H,W] in [-1, 1]; H and W at least 32."""
        total = left.new_zeros(len(left))
        for head, one, other in zip(self.heads, self.taps(left), self.taps(right), strict=True):
            difference = (F.normalize(one, dim=1, eps=1e-10) - F.normalize(other, dim=1, eps=1e-10)).square()
            total = total + head(difference)
        return total

    def taps(self, pictures: Tensor) -> list[Tensor]:
        """Features after the last ReLU of each layer, [N,C,H',W'] each."""
        x, convs, found = (pictures - self.shift) / self.scale, iter(self.features), []
        for layer, depth in enumerate(self.depths):
            if layer in self.pools:
                x = F.max_pool2d(x, *self.pools[layer])
            for _ in range(depth):
                x = F.relu(next(convs)(x))
            found.append(x)
        return found


class Head(nn.Module):
    """Non-negative weight of each channel's squared difference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, difference: Tensor) -> Tensor:
        """[N,C,H,W] -> [N]."""
        return torch.einsum("nchw,c->nhw", difference, self.weight).mean((1, 2))


def load_lpips(path: Path) -> Lpips:
    """LPIPS with the weights of a file; raises LpipsError when it is missing or holds something else."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise LpipsError(
            f"no LPIPS weights at {path}: fetch and convert them first (see evaluation), or do without the term"
        )
    return of_state(load_file(path), str(path))


def of_state(state: Mapping[str, Tensor], where: str = "weights") -> Lpips:
    """LPIPS of tensors; how many convolutions there are says which network it is."""
    number = sum(name.startswith("features.") and name.endswith(".weight") for name in state)
    kinds = {sum(map(len, layers)): kind for kind, layers in LAYERS.items()}
    if number not in kinds:
        raise LpipsError(f"{where} holds {number} convolutions: AlexNet has 5, VGG16 13")
    network = Lpips(kinds[number])
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise LpipsError(f"{where} does not fit LPIPS on {kinds[number]}: {error}") from error
    return network.eval()
