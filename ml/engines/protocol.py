"""How training is distributed, as the trainer sees it: one protocol, so that the trainer knows no engine.

`masters`, `gather` and `scatter` serve the moving average, exact resume in bf16 and export alike: masters are the live
fp32 weights (or this rank's shard of them), gather makes full tensors of shards, scatter is its inverse.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Tensors = dict[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


class EngineError(ValueError):
    """An engine that cannot do what the recipe asks, with what to change."""


class Engine(Protocol):
    """One way to run the forward, the backward and the update; wraps the model once, in `setup`."""

    device: torch.device
    dtype: torch.dtype
    is_main: bool
    data_rank: int
    data_size: int
    model: nn.Module

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Take the model (fp32 weights) to the device and dtype, and make optimizer and schedule over its masters."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one micro-batch; only the `last` one needs to synchronise."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients."""
        ...

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients; returns the gradient norm before clipping."""
        ...

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        ...

    def mean(self, value: float) -> float:
        """The mean of a number over all data ranks, for logs."""
        ...

    def masters(self) -> Tensors:
        """The live fp32 weights by name, or this rank's shard of each."""
        ...

    def gather(self, shards: Mapping[str, Tensor]) -> Tensors:
        """Full tensors on the CPU of the main rank, from shards laid out as `masters`."""
        ...

    def scatter(self, full: Mapping[str, Tensor]) -> Tensors:
        """Shards laid out as `masters`, from full tensors."""
        ...

    def save(self, folder: Path) -> None:
        """Write masters, optimizer and schedule into a folder (`master.safetensors`, `optimizer/`, `scheduler.pt`)."""
        ...

    def load(self, folder: Path) -> None:
        """Take them back."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
