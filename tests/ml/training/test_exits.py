import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.compute.ending import Ending
from infra.compute.task import OUT_OF_MEMORY, PREEMPTED, RANK_LOST
from ml.batching.buckets import Cell
from ml.batching.datasets import LatentBatch
from ml.batching.readers import LoaderError, ReaderLost
from ml.methods import Engine
from ml.models.inputs import Text
from ml.shapes import Size
from ml.training.checkpoint import CheckpointError
from ml.training.exits import (
    OutOfMemory,
    Preempted,
    code_of,
    described,
    explain_oom,
    is_oom,
    largest,
    stopping,
)
from ml.training.guard import TrainingDiverged
from ml.training.watch import Watch

Ranks = Callable[..., list[Any]]
CELL = Cell("256px", 129, Size(256, 256))
SECTION = Engine(
    kind="plain", precision="fp32", grad_clip=1.0, accumulate=1, sequence_parallel=1, checkpoint_blocks=(0, 0)
)


def beyond_memory() -> RuntimeError:
    """What torch raises on a CPU when an address space of this process's size and 1 GiB more is full."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        with pytest.raises(RuntimeError) as error:
            torch.empty(2**33, dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return error.value


def test_a_real_failed_allocation_is_recognised_and_explained() -> None:
    error = beyond_memory()
    assert is_oom(error)
    assert code_of(error) == OUT_OF_MEMORY
    explained = explain_oom(error, CELL, [torch.zeros(2, 16, 33)], "stage1", SECTION)
    said = str(explained)
    assert said.startswith("bucket 256px/256x256/129 does not fit: batches of shape [2, 16, 33] of float32"), said
    levers = (
        "checkpoint_blocks",
        "offload",
        "sequence_parallel",
        "sharding",
        'stages.stage1.buckets."256px".129.batch',
    )
    assert [said.index(lever) for lever in levers] == sorted(said.index(lever) for lever in levers)
    assert "DefaultCPUAllocator" in said
    assert code_of(explained) == OUT_OF_MEMORY


def test_levers_in_use_are_not_offered_again() -> None:
    section = SECTION.model_copy(update={"offload": True, "sharding": "full"})
    said = str(explain_oom(MemoryError(), CELL, [], "stage2", section))
    assert "set engine.offload" not in said
    assert "set engine.sharding" not in said
    assert "(3) lower stages.stage2" in said
    assert "shape unknown" in said


def test_the_largest_tensor_of_a_batch_is_the_one_that_matters() -> None:
    text = Text(torch.zeros(2, 4, 8), torch.zeros(2, 8), torch.ones(2, 4, dtype=torch.bool))
    batch = LatentBatch(torch.zeros(2, 4, 2, 6, 10), text, torch.zeros(2), CELL)
    found = largest({"a": [batch], "b": 3})
    assert found is batch.latents
    assert largest("nothing") is None


def test_other_errors_are_neither() -> None:
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory lane"), TrainingDiverged("step 3")):
        assert not is_oom(error)
        assert code_of(error) == 1
    assert described(ValueError("no column\nsecond line")) == "ValueError: no column"
    assert described(KeyError()) == "KeyError"


def left_alone(folder: str) -> str:
    """Rank 1 is gone in the middle of a collective; what rank 0 is told."""
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        os._exit(9)
    with stopping(Path(folder), "run") as end:
        torch.distributed.all_reduce(torch.ones(1000))
    found = Ending.read(Path(folder), "run")
    os._exit(0 if end.code == RANK_LOST and found is not None and found.code == RANK_LOST else 5)


def test_what_gloo_says_of_a_lost_rank_is_known_as_an_echo(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(left_alone, str(tmp_path), expect_death=True) == [0, 9]
    assert "another rank was gone without a word" in (tmp_path / "stopped.json").read_text()


@pytest.mark.parametrize(
    ("error", "code"), [(Preempted("asked to stop", 7), PREEMPTED), (OutOfMemory("too large"), OUT_OF_MEMORY)]
)
def test_an_end_with_a_code_is_written_and_said(
    tmp_path: Path, error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopping(tmp_path, "r1") as end:
        raise error
    assert end.code == code
    record = json.loads((tmp_path / "stopped.json").read_text())
    step = 7 if code == PREEMPTED else 0
    assert record == {"run_id": "r1", "code": code, "reason": described(error), "step": step, "rank": 0}
    assert f"rank 0 stopped at step {step}: {described(error)}" in capsys.readouterr().err


def test_another_error_goes_on_with_the_step_of_the_last_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")

    def train() -> None:
        with stopping(tmp_path, "r1"), Watch(tmp_path, 3, 60.0, "r1") as watch:
            watch.beat(12, "computing")
            raise ValueError("no column")

    with pytest.raises(ValueError, match="no column"):
        train()
    assert Ending.read(tmp_path, "r1") == Ending("r1", 1, "ValueError: no column", 12, 3)


def test_a_good_end_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "stopped.json").write_text("{}")
    os.utime(tmp_path / "stopped.json", (1.0, 1.0))
    with stopping(tmp_path, "r1") as end:
        pass
    assert end.code == 0
    assert not (tmp_path / "stopped.json").exists(), "an earlier attempt's is removed"


def test_an_error_of_the_house_is_one_line_and_any_other_keeps_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopping(tmp_path, "r1") as end:
        raise CheckpointError("half a checkpoint")
    assert end.code == 1
    assert capsys.readouterr().err == "rank 0 stopped at step 0: CheckpointError: half a checkpoint\n"
    with pytest.raises(ZeroDivisionError), stopping(tmp_path, "r2"):
        raise ZeroDivisionError
    assert Ending.read(tmp_path, "r2") is not None


def test_what_fails_after_a_stop_was_asked_for_is_the_stop(tmp_path: Path) -> None:
    """torchrun's signal reaches compilers and readers too, and their end must not pass for a defect."""
    with stopping(tmp_path, "r1") as end:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise ValueError("the compiler died")
    assert end.code == PREEMPTED
    found = Ending.read(tmp_path, "r1")
    assert found is not None
    assert found.reason == "asked to stop (SIGUSR1), and then: ValueError: the compiler died"


def test_a_lost_reader_may_be_started_again(tmp_path: Path) -> None:
    assert code_of(ReaderLost("gone")) == RANK_LOST
    assert code_of(LoaderError("corrupt")) == 1
