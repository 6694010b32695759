"""How a training ends that does not reach its end: with which exit code, and what it leaves written about it.

Exit codes and the record `stopped.json` are those of `infra/compute`, which starts a training again, or does not, by
what they say. torchrun replaces exit codes by its own, so that the record is what counts.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.compute.ending import Ending
from infra.compute.task import OUT_OF_MEMORY, PREEMPTED, RANK_LOST, STOPPED
from ml import methods
from ml.batching.buckets import Cell
from ml.batching.readers import ReaderLost
from ml.training.stopping import Asked, forget, stop_asked
from ml.training.watch import heartbeat_file

GIB = 2**30
# What torch says on a CPU (c10/core/impl/alloc_cpu.cpp); on a GPU there is a class for it.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
# What gloo and NCCL say on the ranks that are left when another one is gone.
_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket closed"),
    *("remote process exited", "communicator was aborted", "failed to recv, got 0 bytes"),
)


class Preempted(RuntimeError):  # noqa: N818 (it is no error)
    """Training was asked to stop and did, after saving a checkpoint at `step`."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class OutOfMemory(RuntimeError):  # noqa: N818 (it says what happened)
    """A batch that does not fit: which bucket, which shape, what was allocated, and what to change in the recipe."""


class NoMemory(RuntimeError):  # noqa: N818 (it says what happened)
    """Memory was short in a micro-batch of a step, counted from 0, or in its update (None); `said` by the allocator."""

    def __init__(self, error: BaseException, micro_batch: int | None) -> None:
        self.said, self.micro_batch = next(iter(str(error).splitlines()), type(error).__name__), micro_batch
        super().__init__(f"out of memory: {self.said}")


@dataclass(frozen=True)
class Short:
    """Which stage was short of memory: its name and engine in the recipe, its ranks, and whose stage it is."""

    name: str
    engine: methods.Engine
    ranks: int
    autoencoder: bool


@dataclass
class End:
    """The exit code of this process, and who asked it to stop so far (`stop_asked`)."""

    asked: Asked
    code: int = 0


@contextmanager
def stopping(folder: Path, run_id: str) -> Iterator[End]:
    """Around a training: whatever ends it early is written to `stopped.json` before this process, or another, ends.

    Errors of the house say in one line what is wrong and leave an exit code; others go on. Whatever fails once a stop
    was asked for counts as the stop: a signal to all processes takes compilers and readers with it.
    """
    forget(folder / STOPPED)
    with stop_asked(folder) as asked:
        end = End(asked)
        try:
            yield end
        except Exception as error:
            end.code, reason = code_of(error), described(error)
            # torchrun asks the ranks that are left to stop, too, once one is lost: that is no preemption.
            if asked() and end.code == 1:
                end.code, reason = PREEMPTED, f"asked to stop ({asked()}), and then: {reason}"
            _write_down(folder, run_id, error, end.code, reason)
            if end.code == 1 and not _is_ours(error):
                raise


def _write_down(folder: Path, run_id: str, error: Exception, code: int, reason: str) -> None:
    """Leave the record and a line in the log; a full disk takes no more than the record."""
    rank = this_rank()
    step = error.step if isinstance(error, Preempted) else _last_step(folder, rank)
    with suppress(OSError):
        Ending(run_id, code, reason, step, rank).write(folder)
    print(f"rank {rank} stopped at step {step}: {reason}", file=sys.stderr, flush=True)


def _is_ours(error: Exception) -> bool:
    """Whether an error is of a class of the house, whose message says all there is to say."""
    return type(error).__module__.partition(".")[0] in ("ml", "infra")


def this_rank() -> int:
    """The rank that torchrun gave this process; 0 without it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else 0


def code_of(error: Exception) -> int:
    """The exit code that says what kind of end an error is; 1 is an error that would come again."""
    if isinstance(error, Preempted):
        return PREEMPTED
    if isinstance(error, OutOfMemory) or is_oom(error):
        return OUT_OF_MEMORY
    return RANK_LOST if is_lost_rank(error) or isinstance(error, ReaderLost) else 1


def described(error: Exception) -> str:
    """An error as one line: of a lost rank, that it was lost, for what its neighbours report is only an echo."""
    line = next(iter(str(error).strip().splitlines()), "")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return f"another rank was gone without a word ({said})" if is_lost_rank(error) else said


def is_oom(error: BaseException) -> bool:
    """Whether an error says that the memory of the device, or of the host, was not enough."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another process is gone: what ended it stands elsewhere, if anywhere."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


@contextmanager
def short_of_memory(micro_batch: int | None) -> Iterator[None]:
    """Around a part of a step: a micro-batch of it, or its update (None). Raises NoMemory when there is not enough."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_oom(error):
            raise
        raise NoMemory(error, micro_batch) from error


def explain_oom(error: NoMemory, cells: Sequence[Cell], data: Sequence[Any], stage: Short) -> OutOfMemory:
    """What did not fit, and what to change first; levers in use already, or that the stage refuses, are left out.

    `cells` and `data` are those of the step's micro-batches; data is anything that holds tensors.
    """
    chosen = range(len(cells)) if error.micro_batch is None else [error.micro_batch]
    shapes = ", ".join(dict.fromkeys(_shape(largest(data[n])) for n in chosen)) or "unknown"
    buckets = ", ".join(dict.fromkeys(str(cells[n]) for n in chosen))
    part = "the update" if error.micro_batch is None else f"micro-batch {error.micro_batch + 1} of {len(cells)}"
    keys = list(dict.fromkeys(_batch_key(stage, cells[n]) for n in chosen))
    levers = "; ".join(f"({n}) {lever}" for n, lever in enumerate([*_levers(stage), f"lower {' or '.join(keys)}"], 1))
    return OutOfMemory(
        f"bucket {buckets} does not fit: {part}, of shape {shapes}{_allocated()}. Try in this order: {levers}. "
        f"The allocator said: {error.said}"
    )


def largest(data: Any) -> Tensor | None:
    """The largest tensor within a batch: a tensor, or dataclasses, mappings and sequences of them."""
    found = list(_tensors(data))
    return max(found, key=Tensor.numel) if found else None


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif is_dataclass(data):
        for field in fields(data):
            yield from _tensors(getattr(data, field.name))
    elif isinstance(data, Mapping):
        yield from _tensors(list(data.values()))
    elif isinstance(data, (list, tuple)):
        for each in data:
            yield from _tensors(each)


def _levers(stage: Short) -> list[str]:
    """What frees memory without changing what is learned, the mildest first."""
    if stage.autoencoder:
        return []
    return [f"set engine.{words}" for words, _ in methods.memory_levers(stage.engine, stage.ranks)]


def _batch_key(stage: Short, cell: Cell) -> str:
    """Where the batch size of a bucket stands in the recipe."""
    if stage.autoencoder:
        return f"autoencoder.stages.{stage.name}.batch"
    return f'stages.{stage.name}.buckets."{cell.resolution}".{cell.frames}.batch'


def _shape(tensor: Tensor | None) -> str:
    return "unknown" if tensor is None else f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _allocated() -> str:
    """What the device holds; empty without a GPU."""
    if not torch.cuda.is_available():
        return ""
    free, whole = torch.cuda.mem_get_info()
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    numbers = (torch.cuda.memory_allocated(), peak, held, free, whole)
    now, peak_gib, held_gib, free_gib, whole_gib = (f"{number / GIB:.1f}" for number in numbers)
    return f"; {now} GiB allocated, {peak_gib} at the peak, {held_gib} reserved, {free_gib} of {whole_gib} GiB free"


def _last_step(folder: Path, rank: int) -> int:
    """The step that this process stood at by its own heartbeat; 0 before the first."""
    with suppress(OSError, ValueError):
        beat = json.loads(heartbeat_file(folder, rank).read_text(encoding="utf-8"))
        return int(beat["step"]) if beat["pid"] == os.getpid() else 0
    return 0
