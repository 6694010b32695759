"""Who a process is among the ranks of a training, and the groups it talks in. Everything about ranks lives here.

Tensor ranks are neighbours, then sequence, then data:
rank = (data_rank * sequence_parallel + sequence_rank) * tensor_parallel + tensor_rank.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ml.engines.protocol import EngineError
from ml.methods import Engine

# A collective that waits longer than this has lost a rank; the watch of a training (survival.hang_seconds) looks
# first and says more.
TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """The place of this process; `World()` is a process by itself.

    `replicas` are the ranks that hold the same weights (data x sequence): gradients are averaged there. `data`,
    `sequence` and `tensor` differ from this rank in that coordinate alone. A group of one rank is None.
    """

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    tensor_rank: int = 0
    replicas: ProcessGroup | None = None
    data: ProcessGroup | None = None
    sequence: ProcessGroup | None = None
    tensor: ProcessGroup | None = None

    @classmethod
    def join(cls, section: Engine, device: torch.device) -> Self:
        """Take part in what torchrun started: gloo on the CPU, and NCCL too on a GPU. Together.

        A process that is alone makes no process group. Raises EngineError where the ranks cannot be cut as the section
        asks.
        """
        size = started()
        if size % section.model_ranks:
            raise EngineError(
                f"{size} process(es) cannot be cut into groups of {section.model_ranks} (sequence_parallel "
                f"{section.sequence_parallel} x tensor_parallel {section.tensor_parallel} x pipeline_parallel "
                f"{section.pipeline_parallel}): start a multiple of {section.model_ranks}, or lower these"
            )
        if size == 1:
            return cls()
        if not dist.is_initialized():
            # Small numbers and plain data travel between hosts, whatever the tensors do.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
        return cls._cut(section.sequence_parallel, section.tensor_parallel * section.pipeline_parallel)

    @classmethod
    def _cut(cls, sequence: int, tensor: int) -> Self:
        rank, size = dist.get_rank(), dist.get_world_size()
        data = size // (sequence * tensor)
        # [data, sequence, tensor] -> the rank there.
        grid = torch.arange(size).view(data, sequence, tensor)
        data_rank, sequence_rank, tensor_rank = (int(i) for i in (grid == rank).nonzero()[0])
        return cls(
            rank,
            size,
            data_rank,
            data,
            sequence_rank,
            tensor_rank,
            replicas=_group(grid.permute(2, 0, 1).flatten(1)),
            data=_group(grid.permute(1, 2, 0).flatten(0, 1)),
            sequence=_group(grid.permute(0, 2, 1).flatten(0, 1)),
            tensor=_group(grid.flatten(0, 1)),
        )

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same weights."""
        return 1 if self.replicas is None else self.replicas.size()

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64. Together."""
        if self.size == 1:
            return [float(value) for value in values]
        sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def collect(self, value: Any) -> list[Any]:
        """What every rank gave, in the order of ranks, on all of them; plain data only. Together."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all ranks into each tensor, in place. Together."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def barrier(self) -> None:
        """Wait for all ranks: for the processes, not for what their GPUs still do. Together."""
        self.total([0.0])

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def started() -> int:
    """How many processes were started together; 1 without torchrun, which says so in the environment."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1


def local_rank() -> int | None:
    """Which process of its host this is, as torchrun says; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def _group(rows: Tensor) -> ProcessGroup | None:
    """This rank's group of those in the rows [groups, ranks]; the default group where a row is everybody. Together."""
    if rows.shape[1] == 1:
        return None
    if rows.shape[0] == 1:
        return dist.group.WORLD
    mine, _ = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    return cast(ProcessGroup, mine)
