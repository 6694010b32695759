"""Activations that are not kept: what a block keeps of its forward pass for the backward pass, and where.

Every transformer of the house runs its blocks through `Recompute`, which an engine sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Recompute:
    """How the blocks chosen by `checkpoint_blocks` save memory.

    `block` keeps a block's inputs and makes the rest again; `selective` also keeps what matrix products and attention
    gave; `offload` keeps what is kept in pinned memory of the host.
    """

    kind: Literal["block", "selective"] = "block"
    offload: bool = False

    def run(self, block: nn.Module | Callable[..., Any], chosen: bool, *given: object) -> Any:
        """What a block makes of its inputs; `chosen` blocks keep less of it, and only while gradients are taken."""
        if chosen and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)
