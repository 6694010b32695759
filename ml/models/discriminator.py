"""The adversary of an autoencoder: a 3-D patch discriminator (PatchGAN), and the hinge losses of the two.

Letters: B batch, T frames, H W pixels. Pictures are clips of one frame. Both releases that trained with one have the
same network (om/vae_v1_3/discriminator.py, 1.3: three layers; om/vae/discriminator.py, main: five, with dropout).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Widths double up to eight times the first one's.
MOST, SLOPE = 8, 0.2
WEIGHT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Logits of patches: above 0 is real. Convolutions of three taps, batch norms, leaky ReLUs.

    `layers` halve height and width, and the first two of them time; two more only look. A `dropout` above 0 follows
    every normed layer, as on main (0.3); 1.3 has none. Weights are drawn with a deviation of 0.02.
    """

    def __init__(self, layers: int = 3, channels: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = layers
        blocks: list[nn.Module] = [nn.Conv3d(3, channels, 3, 2, 1), nn.LeakyReLU(SLOPE, inplace=True)]
        width = channels
        for layer in range(1, layers + 1):
            stride = 1 if layer == layers else (2 if layer == 1 else 1, 2, 2)
            wider = channels * min(2**layer, MOST)
            blocks += [
                nn.Conv3d(width, wider, 3, stride, 1, bias=False),
                nn.BatchNorm3d(wider),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
            if dropout > 0:
                blocks.append(nn.Dropout(dropout))
            width = wider
        self.main = nn.Sequential(*blocks, nn.Conv3d(width, 1, 3, 1, 1))
        self._start()

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B,1,T',H',W'] of a video [B,3,T,H,W] in [-1, 1]: one for each patch of 2**layers pixels.

        Raises ValueError when a batch in training is one patch of one frame, which batch norms cannot learn from.
        """
        patch = 2**self.layers
        if self.training and len(video) * -(-video.shape[2] // 4) == 1 and max(video.shape[3:]) <= patch:
            raise ValueError(
                f"a discriminator of {self.layers} layers sees one patch of {patch} px in a batch of "
                f"{tuple(video.shape)}: take larger pictures, more of them, or fewer layers"
            )
        logits: Tensor = self.main(video)
        return logits

    @torch.no_grad()
    def _start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, WEIGHT_STD)
            elif isinstance(module, nn.BatchNorm3d):
                nn.init.normal_(module.weight, 1.0, WEIGHT_STD)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Half of mean max(0, 1 - real) + mean max(0, 1 + fake): nothing is left to learn once both are a margin apart."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Minus the mean logit: as real as can be."""
    return -fake.mean()
