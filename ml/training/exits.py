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
from ml.training.stopping import forget
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


@dataclass
class End:
    """The exit code of this process."""

    code: int = 0


@contextmanager
def stopping(folder: Path, run_id: str) -> Iterator[End]:
    """Around a training: whatever ends it early is written to `stopped.json` before this process, or another, ends.

    A training that was asked to stop, or for which memory was short, says so in one line and leaves its exit code;
    other errors go on.
    """
    end = End()
    forget(folder / STOPPED)
    try:
        yield end
    except Exception as error:
        end.code, rank = code_of(error), this_rank()
        step = error.step if isinstance(error, Preempted) else _last_step(folder, rank)
        Ending(run_id, end.code, described(error), step, rank).write(folder)
        print(f"rank {rank} stopped at step {step}: {described(error)}", file=sys.stderr, flush=True)
        if end.code not in (PREEMPTED, OUT_OF_MEMORY):
            raise


def this_rank() -> int:
    """The rank that torchrun gave this process; 0 without it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else 0


def code_of(error: Exception) -> int:
    """The exit code that says what kind of end an error is; 1 is an error that would come again."""
    if isinstance(error, Preempted):
        return PREEMPTED
    if isinstance(error, OutOfMemory) or is_oom(error):
        return OUT_OF_MEMORY
    return RANK_LOST if is_lost_rank(error) else 1


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


def explain_oom(
    error: BaseException, cell: Cell, data: Sequence[Any], stage: str, section: methods.Engine | None = None
) -> OutOfMemory:
    """What did not fit, and what to change first; levers that `section` shows to be in use already are left out.

    `data` are the micro-batches of the step: anything that holds tensors.
    """
    shapes = ", ".join(dict.fromkeys(_shape(largest(each)) for each in data)) or "unknown"
    key = f'stages.{stage}.buckets."{cell.resolution}".{cell.frames}.batch'
    levers = "; ".join(f"({n}) {lever}" for n, lever in enumerate([*_levers(section), f"lower {key}"], 1))
    return OutOfMemory(
        f"bucket {cell} does not fit: batches of shape {shapes}{_allocated()}. Try in this order: {levers}. "
        f"The allocator said: {next(iter(str(error).splitlines()), '')}"
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


def _levers(section: methods.Engine | None) -> list[str]:
    """What frees activations, then weights, without changing what is learned; dearest in time last."""
    free = {
        "raise engine.checkpoint_blocks": True,
        "set engine.offload": section is None or not section.offload,
        "raise engine.sequence_parallel": True,
        "set engine.sharding": section is None or section.sharding == "none",
    }
    return [lever for lever, offered in free.items() if offered]


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
