from typing import Any

import pytest
import torch

from ml.engines.make import device_of, how_to_start, make_engine
from ml.engines.plain import PlainEngine
from ml.engines.protocol import EngineError
from ml.sections import Compute, Engine

SECTION = {"kind": "plain", "precision": "fp32", "grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1}
CPU = torch.device("cpu")


def compute(accelerators: str, nodes: int = 1, processes: int | None = None) -> Compute:
    return Compute(accelerators=accelerators, nodes=nodes, price="cpu-assume-2026", processes=processes)


def section(**over: Any) -> Engine:
    return Engine(**{**SECTION, "checkpoint_blocks": (0, 0), **over})


@pytest.mark.parametrize(
    ("asked", "hardware", "started", "why"),
    [
        ({"sequence_parallel": 4}, compute("CPU:2"), 1, r"1 process\(es\) cannot be cut into groups of 4"),
        ({"tensor_parallel": 2}, compute("CPU:2"), 1, r"cut into groups of 2 .* start a multiple of 2, or lower"),
        ({}, compute("H200:8"), 1, r"asks for 8 process\(es\) \(H200:8 on 1 node\(s\)\), 1 started"),
        ({}, compute("CPU:2", processes=2), 1, "start torchrun --standalone --nproc-per-node 2 -m ml.train"),
        ({}, compute("CPU:1"), 2, r"asks for 1 process\(es\) .* 2 started: start one, without torchrun"),
    ],
)
def test_processes_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], hardware: Compute, started: int, why: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(EngineError, match=why):
        make_engine(section(**asked), hardware)


def test_the_command_for_several_nodes_says_where_they_meet() -> None:
    assert how_to_start(compute("H200:8", 28)).startswith(
        "start torchrun --nnodes 28 --node-rank N --master-addr HOST --nproc-per-node 8 -m ml.train ..."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_named() -> None:
    with pytest.raises(EngineError, match="asks for H100:1, and torch sees no CUDA device"):
        make_engine(section(), compute("H100:1"))


def test_a_cpu_engine_takes_the_cores_and_the_precision_it_is_given() -> None:
    before = torch.get_num_threads()
    try:
        made = make_engine(section(precision="bf16", sharding="full"), compute("CPU:3"))
        assert torch.get_num_threads() == 3
        assert device_of(compute("CPU:4", processes=2)) == CPU
        assert torch.get_num_threads() == 2
        assert device_of(compute("CPU:1", processes=2)) == CPU
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert (made.device, made.dtype, made.rank, made.size, made.data_size) == (CPU, torch.bfloat16, 0, 1, 1)
    assert type(made) is PlainEngine
    made.barrier()
    made.close()
