from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from ml.engines.protocol import EngineError
from ml.engines.world import World, local_rank, started
from ml.methods import Engine

CPU = torch.device("cpu")
GROUPS = ("replicas", "data", "sequence", "tensor")
Ranks = Callable[..., list[Any]]


def section(sequence: int = 1, tensor: int = 1) -> Engine:
    return Engine(
        kind="plain",
        precision="fp32",
        grad_clip=1.0,
        accumulate=1,
        sequence_parallel=sequence,
        tensor_parallel=tensor,
        checkpoint_blocks=(0, 0),
    )


def place(*cuts: tuple[int, int]) -> list[tuple[Any, ...]]:
    """For every (sequence, tensor): this rank's coordinates and the members of its groups."""
    found: list[tuple[Any, ...]] = []
    for sequence, tensor in cuts:
        world = World.join(section(sequence, tensor), CPU)
        groups = [getattr(world, name) for name in GROUPS]
        members = [None if group is None else dist.get_process_group_ranks(group) for group in groups]
        found.append((world.data_rank, world.data_size, world.sequence_rank, world.tensor_rank, *members))
    world.close()
    return found


def talk() -> tuple[Any, ...]:
    world = World.join(section(), CPU)
    tensors = [torch.full((2,), float(world.rank)), torch.tensor(3.0)]
    world.average(tensors)
    world.barrier()
    said = world.collect({"rank": world.rank, "names": ["a"] * world.rank})
    big = world.total([1e16, 1.0, float("nan") if world.rank else 0.0])
    world.close()
    return tensors[0].tolist(), float(tensors[1]), said, big, (world.rank, world.size, dist.is_initialized())


def test_a_process_alone_makes_no_group() -> None:
    world = World.join(section(), CPU)
    assert world == World()
    assert not dist.is_initialized()
    assert (started(), local_rank(), world.num_replicas) == (1, None, 1)
    tensor = torch.ones(2)
    world.average([tensor])
    assert (world.total([1, 2.5]), world.collect("x"), tensor.tolist()) == ([1.0, 2.5], ["x"], [1.0, 1.0])
    world.barrier()
    world.close()


def test_ranks_are_tensor_then_sequence_then_data(ranks: Ranks) -> None:
    """Of 4 ranks; a group of everybody is the default group, one of a single rank is none."""
    both, sequence, tensor, data = zip(*ranks(place, (2, 2), (2, 1), (1, 2), (1, 1), count=4), strict=True)
    assert [found[:4] for found in both] == [(0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 1, 1)]
    assert both[1][4:] == ([1, 3], None, [1, 3], [0, 1])
    assert [found[:4] for found in sequence] == [(0, 2, 0, 0), (0, 2, 1, 0), (1, 2, 0, 0), (1, 2, 1, 0)]
    assert sequence[2][4:] == ([0, 1, 2, 3], [0, 2], [2, 3], None)
    assert [found[:4] for found in tensor] == [(0, 2, 0, 0), (0, 2, 0, 1), (1, 2, 0, 0), (1, 2, 0, 1)]
    assert tensor[2][4:] == ([0, 2], [0, 2], None, [2, 3])
    assert [found[:4] for found in data] == [(rank, 4, 0, 0) for rank in range(4)]
    assert data[3][4:] == ([0, 1, 2, 3], [0, 1, 2, 3], None, None)


def test_ranks_add_exchange_and_average(ranks: Ranks) -> None:
    for rank, (averaged, scalar, said, big, place_after) in enumerate(ranks(talk)):
        assert (averaged, scalar) == ([0.5, 0.5], 3.0)
        assert said == [{"rank": 0, "names": []}, {"rank": 1, "names": ["a"]}]
        assert big[:2] == [2e16, 2.0]
        assert big[2] != big[2]
        assert place_after == (rank, 2, False)


def test_ranks_that_cannot_be_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(EngineError, match=r"6 process\(es\) cannot be cut into groups of 4 .*start a multiple of 4"):
        World.join(section(2, 2), CPU)
