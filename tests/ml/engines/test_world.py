import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed as dist

from infra.compute.local import ROOT, LocalLauncher
from infra.compute.task import Resources, Task
from ml.engines.protocol import EngineError
from ml.engines.world import World, local_rank, started
from ml.methods import Engine

CPU = torch.device("cpu")
GROUPS = ("replicas", "data", "sequence", "tensor", "pipeline")
Ranks = Callable[..., list[Any]]


def section(sequence: int = 1, tensor: int = 1, pipeline: int = 1) -> Engine:
    return Engine(
        kind="colossal",
        precision="fp32",
        grad_clip=1.0,
        accumulate=1,
        sequence_parallel=sequence,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        checkpoint_blocks=(0, 0),
    )


def place(*cuts: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """For every (sequence, tensor, pipeline): this rank's coordinates and the members of its groups."""
    found: list[tuple[Any, ...]] = []
    for cut in cuts:
        world = World.join(section(*cut), CPU)
        groups = [getattr(world, name) for name in GROUPS]
        members = [None if group is None else dist.get_process_group_ranks(group) for group in groups]
        coordinates = (world.data_rank, world.data_size, world.sequence_rank, world.tensor_rank)
        found.append((*coordinates, *members, world.pipeline_rank))
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
    assert both[1][4:] == ([1, 3], None, [1, 3], [0, 1], None, 0)
    assert [found[:4] for found in sequence] == [(0, 2, 0, 0), (0, 2, 1, 0), (1, 2, 0, 0), (1, 2, 1, 0)]
    assert sequence[2][4:] == ([0, 1, 2, 3], [0, 2], [2, 3], None, None, 0)
    assert [found[:4] for found in tensor] == [(0, 2, 0, 0), (0, 2, 0, 1), (1, 2, 0, 0), (1, 2, 0, 1)]
    assert tensor[2][4:] == ([0, 2], [0, 2], None, [2, 3], None, 0)
    assert [found[:4] for found in data] == [(rank, 4, 0, 0) for rank in range(4)]
    assert data[3][4:] == ([0, 1, 2, 3], [0, 1, 2, 3], None, None, None, 0)


def test_stages_of_a_pipeline_lie_between_sequence_and_data(ranks: Ranks) -> None:
    piped, sequence = zip(*ranks(place, (1, 1, 2), (2, 1, 2), count=4), strict=True)
    assert [(found[0], found[-1]) for found in piped] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert piped[2][4:-1] == ([0, 2], [0, 2], None, None, [2, 3])
    assert [(found[2], found[-1]) for found in sequence] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert sequence[2][4:-1] == ([2, 3], None, [2, 3], None, [0, 2])


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


LISTENER = """
import pathlib, sys, time, torch
from ml.engines.world import World
from ml.methods import Engine
cut = {"accumulate": 1, "sequence_parallel": 2, "checkpoint_blocks": (0, 0)}
world = World.join(Engine(kind="plain", precision="fp32", grad_clip=1.0, **cut), torch.device("cpu"))
out = pathlib.Path(sys.argv[2])
(out / f"said-{world.rank}").write_text(str(world.total([1.0])))
while not (out / "go").exists():
    time.sleep(0.05)
world.close()
"""


def test_nobody_from_outside_reaches_the_ranks_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher's processes listen on, and that they do talk."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "listener.py").write_text(LISTENER, encoding="utf-8")
    (out := tmp_path / "out").mkdir()
    task = Task("a/b", "listener", ("--out", str(out)), out, Resources("CPU:2", 1, "x"), "test", "e", processes=2)
    launcher = LocalLauncher(tmp_path, grace_seconds=2.0)
    handle = launcher.submit(task, "run1", "sqlite:///unused.db")
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("said-*"))) < 2:
            assert time.monotonic() < deadline, launcher.log_tail(handle)
            time.sleep(0.1)
        supervisor = psutil.Process(handle.data["pid"])
        sockets = [one for process in supervisor.children(recursive=True) for one in process.net_connections("inet")]
        listening = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        (out / "go").touch()
        while launcher.poll(handle).running and time.monotonic() < deadline:
            time.sleep(0.1)
        assert launcher.poll(handle).status == "succeeded", launcher.log_tail(handle)
    finally:
        launcher.cancel(handle)
