import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
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
from ml.recipe import Recipe
from ml.shapes import Size
from ml.train import main
from ml.training.checkpoint import CheckpointError
from ml.training.exits import (
    NoMemory,
    OutOfMemory,
    Preempted,
    Short,
    code_of,
    described,
    explain_oom,
    is_oom,
    largest,
    short_of_memory,
    stopping,
)
from ml.training.guard import TrainingDiverged
from ml.training.step import Denoising
from ml.training.watch import Watch

Ranks = Callable[..., list[Any]]
STILL, CELL = Cell("256px", 1, Size(256, 256)), Cell("256px", 129, Size(256, 256))
SECTION = Engine(
    kind="plain", precision="fp32", grad_clip=1.0, accumulate=1, sequence_parallel=1, checkpoint_blocks=(0, 0)
)
STAGE = Short("stage1", SECTION, ranks=1, autoencoder=False)


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
    with pytest.raises(NoMemory) as caught, short_of_memory(1):
        raise error
    explained = explain_oom(caught.value, [STILL, CELL], [torch.zeros(3), torch.zeros(2, 16, 33)], STAGE)
    said = str(explained)
    start = "bucket 256px/256x256/129 does not fit: micro-batch 2 of 2, of shape [2, 16, 33] of float32"
    assert said.startswith(start), said
    levers = (
        "(1) set engine.checkpoint_blocks: [100, 100], recompute: block",
        "(2) set engine.checkpoint_blocks: [100, 100] with offload: true",
        '(3) lower stages.stage1.buckets."256px".129.batch',
    )
    assert [said.index(lever) for lever in levers] == sorted(said.index(lever) for lever in levers)
    assert "DefaultCPUAllocator" in said
    assert code_of(explained) == code_of(caught.value) == OUT_OF_MEMORY


def said_of(stage: Short, error: NoMemory) -> str:
    return str(explain_oom(error, [STILL, CELL], [None, None], stage))


def test_only_levers_that_the_stage_would_take_are_offered() -> None:
    section = SECTION.model_copy(update={"checkpoint_blocks": (100, 100), "offload": True, "sharding": "full"})
    said = said_of(replace(STAGE, engine=section, ranks=2), NoMemory(MemoryError(), 0))
    assert "The allocator said: MemoryError" in said
    assert "(1) set engine.checkpoint_blocks: [100, 100], recompute: block" not in said
    assert "offload: true" not in said
    assert '(1) set engine.sequence_parallel: 2; (2) lower stages.stage1.buckets."256px".1.batch' in said
    assert "shape unknown" in said


def greedy(engine: Any, data: Any, generator: Any) -> Any:
    """Asks for 4 PiB, which no address space has."""
    return torch.empty(2**50)


def test_a_batch_that_does_not_fit_ends_with_its_code_and_its_name(
    tmp_path: Path, latents: Path, mini: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Denoising, "loss", lambda self, *given: greedy(*given))
    (tmp_path / "recipe.yaml").write_text(mini.dump(), encoding="utf-8")
    arguments = ["stage", "--recipe", str(tmp_path / "recipe.yaml"), "--workspace", str(tmp_path), "--out"]
    arguments += [str(tmp_path / "out"), "--input", f"latents={latents}", "--option", "stage=stage1"]
    assert main(arguments) == OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert "OutOfMemory: bucket 48x80/" in said
    assert "does not fit: micro-batch 1 of" in said
    assert 'stages.stage1.buckets."48x80".' in said
    assert json.loads((tmp_path / "out" / "stopped.json").read_text())["code"] == OUT_OF_MEMORY


def test_a_phase_of_the_autoencoder_is_told_its_own_key_and_no_lever() -> None:
    said = said_of(replace(STAGE, autoencoder=True), NoMemory(MemoryError(), 0))
    assert "Try in this order: (1) lower autoencoder.stages.stage1.batch. The" in said


def test_an_update_that_does_not_fit_names_every_bucket() -> None:
    with pytest.raises(NoMemory) as caught, short_of_memory(None):
        raise MemoryError
    said = said_of(STAGE, caught.value)
    assert said.startswith("bucket 256px/256x256/1, 256px/256x256/129 does not fit: the update, of shape unknown")
    assert 'lower stages.stage1.buckets."256px".1.batch or stages.stage1.buckets."256px".129.batch' in said


def test_other_errors_pass_a_step_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), short_of_memory(0):
        raise RuntimeError("shapes do not match")


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
