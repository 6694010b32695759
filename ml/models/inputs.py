"""What every transformer of the house is told beside the noisy latent, and how the house calls any of them.

Letters: B batch, C latent channels, t h w latent grid, L text tokens, D context size, P pooled size.

Each network keeps the forward of its generation (names, shapes and units of the original). `arguments` turns the
house's inputs into that forward's keywords and `result` turns what comes out into [B,C or 2C,t,h,w], so that a trainer
may wrap the module as it likes: `denoise(wrapped, network, x, t, inputs)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ml.models.recompute import Recompute
from ml.models.sequence import SequenceParallel
from ml.models.weights import Card, Origin


@dataclass(frozen=True)
class Text:
    """Embedded texts of a batch: context [B,L,D], pooled [B,P], and which tokens are real, mask [B,L] bool."""

    context: Tensor
    pooled: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Text":
        """On a device, floats in a dtype."""
        return Text(self.context.to(device, dtype), self.pooled.to(device, dtype), self.mask.to(device))

    def pin_memory(self) -> "Text":
        """In page-locked memory, which a GPU copies from without waiting."""
        return Text(self.context.pin_memory(), self.pooled.pin_memory(), self.mask.pin_memory())

    def expand(self, count: int) -> "Text":
        """One text [1,...] for `count` samples."""
        return Text(self.context.expand(count, -1, -1), self.pooled.expand(count, -1), self.mask.expand(count, -1))


@dataclass(frozen=True)
class Inputs:
    """Everything beside x and t. Pixels and frames are of the clip, equal for the whole batch; `fps` [B] is not.

    `condition` [B,C+1,t,h,w] is the mask (1 = given), then the given latent and zero elsewhere. `active` [B,t] bool
    says which latent frames are being denoised (1.1, 1.2); None = all. `given` are the indices of given latent frames,
    equal for the whole batch (1.3). `guidance` is for guidance-distilled networks.
    """

    text: Text
    height: int
    width: int
    frames: int
    fps: Tensor
    condition: Tensor | None = None
    active: Tensor | None = None
    given: tuple[int, ...] = ()
    guidance: float | None = None

    @classmethod
    def stack(cls, rows: Sequence["Inputs"]) -> "Inputs":
        """The inputs of several batches of one shape, as one batch; all have a condition, or none has."""
        texts = [row.text for row in rows]
        text = Text(*(torch.cat([getattr(t, name) for t in texts]) for name in ("context", "pooled", "mask")))
        condition = None if rows[0].condition is None else torch.cat([_some(row.condition) for row in rows])
        active = None if rows[0].active is None else torch.cat([_some(row.active) for row in rows])
        fps = torch.cat([row.fps for row in rows])
        return replace(rows[0], text=text, fps=fps, condition=condition, active=active)


class Denoiser(Protocol):
    """What the house asks of a transformer, whatever its generation (each is an `nn.Module` too)."""

    checkpoint_blocks: tuple[int, int]
    recompute: Recompute
    sp: SequenceParallel

    @property
    def null_context(self) -> Tensor | None:
        """[L,D] that stands for no text where the network holds one of its own (1.x); None where text is encoded."""
        ...

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Keywords of the network's own forward; x [B,C,t,h,w], t [B] in the network's unit."""
        ...

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        """What the forward gave, as [B,C or 2C,t,h,w]."""
        ...

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        ...


def denoise(model: nn.Module, network: Denoiser, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    """Call `network`, or the module that wraps it: x [B,C,t,h,w] at t [B] -> [B,C or 2C,t,h,w]."""
    return network.result(model(**network.arguments(x, t, inputs)), x)


def _some(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("rows of one batch must all have a condition, or none")
    return tensor
