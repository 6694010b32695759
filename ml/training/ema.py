"""Exponential moving average of the weights, in fp32, over whatever share of the masters an engine holds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ml.engines.protocol import Tensors


class EMA:
    """average = decay * average + (1 - decay) * weights, once an update.

    fp32, because a bf16 average at decay 0.9999 rounds away almost every update (Open-Sora 2.0 averages bf16 copies).
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.shards: Tensors = {name: tensor.detach().float().clone() for name, tensor in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor]) -> None:
        """Move the average towards the masters."""
        names = list(self.shards)
        torch._foreach_lerp_([self.shards[n] for n in names], [masters[n] for n in names], 1 - self.decay)

    def restore(self, shards: Mapping[str, Tensor]) -> None:
        """Take back a saved average."""
        for name, tensor in shards.items():
            self.shards[name].copy_(tensor)
