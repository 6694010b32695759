"""How training is distributed, as the trainer sees it: one protocol, so that the trainer knows no engine.

`masters`, `gather` and `scatter` serve the moving average, exact resume in bf16 and export alike: masters are the live
fp32 weights (or this rank's shard of them), gather makes full tensors of shards, scatter is its inverse. Full tensors
carry the names and shapes of the unwrapped model, whatever the engine, so that what one engine saved another resumes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Tensors = dict[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class EngineError(ValueError):
    """An engine that cannot do what the recipe asks, with what to change."""


@dataclass(frozen=True)
class Moments:
    """What AdamW keeps: means of the gradients and of their squares, and how many updates each weight has had.

    `mean` and `square` are laid out as `masters`; a weight that never had a gradient is absent from all three.
    """

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    updates: Mapping[str, int]


class Cut(Protocol):
    """How one weight is cut over tensor-parallel ranks: which part of the full tensor each of them holds."""

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor of the shards of all ranks, in their order."""
        ...

    def take(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The shard of one of `size` ranks; the inverse of `join`."""
        ...


class Engine(Protocol):
    """One way to run the forward, the backward and the update; wraps the model once, in `setup`.

    Of `size` ranks, `data_size` groups take different batches; the ranks of a group (sequence x tensor x pipeline)
    share one. Methods marked *together* must be called by all ranks at the same point.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int
    size: int
    data_rank: int
    data_size: int
    model: nn.Module

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        ...

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Take the model (fp32 weights, the same on all ranks) to the device and dtype; optimizer and schedule over its
        masters. Together.
        """
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one micro-batch; only the `last` one needs to synchronise."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients. Together."""
        ...

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients; the gradient norm (over all ranks) before clipping.

        Nothing is updated when the norm is not finite; the schedule advances all the same. Together.
        """
        ...

    def discard(self) -> None:
        """Drop the gradients instead of `step`; the schedule advances all the same. Together."""
        ...

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        ...

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64. Together."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """What every rank gave, in the order of ranks, on all of them; plain data only. Together."""
        ...

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all ranks into each tensor, in place: for what an objective trains by itself. Together."""
        ...

    def masters(self) -> Tensors:
        """The live fp32 weights by name, or this rank's shard of each; only those that are trained."""
        ...

    def moments(self) -> Moments:
        """The optimizer's live state, laid out as `masters`."""
        ...

    def gather(self, shards: Mapping[str, Tensor], spread: bool = False) -> Tensors:
        """Full tensors, copied to the CPU, from shards laid out as `masters`.

        All of them on the main rank and nothing elsewhere; `spread` gives every rank a part of the names instead, so
        that the parts together are all of them and no rank holds more than about its share of the bytes. Together.
        """
        ...

    def scatter(self, full: Mapping[str, Tensor]) -> Tensors:
        """Shards on the device, laid out as `masters`, from full tensors; every rank is given all names.

        `full` may read each tensor only when it is asked for it. Together.
        """
        ...

    def restore(self, masters: Mapping[str, Tensor], moments: Moments, steps: int) -> None:
        """Take back full weights, full optimizer state, and a schedule that has made `steps` steps. Together.

        Raises EngineError when the weights are of another network, naming the first that differs.
        """
        ...

    def publish(self) -> None:
        """Let the model compute with the masters as they are now, after they were written to. Together."""
        ...

    def cut(self, network: nn.Module) -> None:
        """Cut a frozen network over the tensor ranks, in place, before it goes to the device; nothing without them.

        All tensor ranks of a group must then give it the same inputs, at the same point. Together.
        """
        ...

    def barrier(self) -> None:
        """Wait for all ranks. Together."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
