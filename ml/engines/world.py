"""Who a process is among the ranks of a training, and the groups it talks in. Everything about ranks lives here.

Tensor ranks are neighbours, then sequence, then pipeline, then data: rank =
((data_rank * pipeline_parallel + pipeline_rank) * sequence_parallel + sequence_rank) * tensor_parallel + tensor_rank.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import ProcessGroup

from ml.engines.protocol import EngineError
from ml.methods import Engine

# A collective that waits longer than this has lost a rank; the watch of a training (survival.hang_seconds) looks
# first and says more.
TIMEOUT = timedelta(minutes=60)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class World:
    """The place of this process; `World()` is a process by itself.

    `replicas` are the ranks that hold the same weights (data x sequence): gradients are averaged there. `data`,
    `sequence`, `tensor` and `pipeline` (stages, first to last) differ from this rank in that coordinate alone. A group
    of one rank is None.
    """

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    tensor_rank: int = 0
    pipeline_rank: int = 0
    replicas: ProcessGroup | None = None
    data: ProcessGroup | None = None
    sequence: ProcessGroup | None = None
    tensor: ProcessGroup | None = None
    pipeline: ProcessGroup | None = None

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
            on = device if device.type == "cuda" else None
            dist.init_process_group(backend, timeout=TIMEOUT, device_id=on, **_met())
        return cls._cut(section)

    @classmethod
    def _cut(cls, section: Engine) -> Self:
        rank, size = dist.get_rank(), dist.get_world_size()
        data = size // section.model_ranks
        # [data, pipeline, sequence, tensor] -> the rank there.
        grid = torch.arange(size).view(
            data, section.pipeline_parallel, section.sequence_parallel, section.tensor_parallel
        )
        data_rank, pipeline_rank, sequence_rank, tensor_rank = (int(i) for i in (grid == rank).nonzero()[0])
        return cls(
            rank,
            size,
            data_rank,
            data,
            sequence_rank,
            tensor_rank,
            pipeline_rank,
            replicas=_group(grid.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)),
            data=_group(grid.permute(1, 2, 3, 0).flatten(0, 2)),
            sequence=_group(grid.permute(0, 1, 3, 2).flatten(0, 2)),
            tensor=_group(grid.flatten(0, 2)),
            pipeline=_group(grid.permute(0, 2, 3, 1).flatten(0, 2)),
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


def _met() -> dict[str, Any]:
    """Where ranks meet: what torchrun serves, or on one host without that, what rank 0 serves on loopback alone."""
    variables = os.environ
    if variables.get("MASTER_ADDR") != LOOPBACK or variables.get("TORCHELASTIC_USE_AGENT_STORE") != "False":
        return {}
    rank, size, port = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    # torch's own socket would listen on every network of the host.
    listener = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
    store = TCPStore(LOOPBACK, port, size, rank == 0, master_listen_fd=listener)
    return {"store": store, "rank": rank, "world_size": size}


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
