"""Who reads batches ahead: a thread of this process, or worker processes; both hand them over in order."""

import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from ml.batching.sampler import Batch
from ml.methods import Loading

# How often a reader that waits looks whether its workers live.
POLL_SECONDS = 1.0
# How long a read under way is waited for when nobody wants it any more.
CLOSE_SECONDS = 5.0


class LoaderError(RuntimeError):
    """A batch that could not be read, with its examples and what to do."""


class ReaderLost(LoaderError):  # noqa: N818 (it says what happened)
    """A reader that died or fell silent: another attempt may read what this one could not."""


@dataclass(frozen=True)
class Failed:
    """What stands for the data of a batch that `load` failed on; the exception itself may not leave its process."""

    reason: str
    trace: str
    cause: BaseException | None = field(default=None, compare=False)

    def error(self, batch: Batch) -> LoaderError:
        """The error to raise."""
        made = LoaderError(f"{named(batch)} could not be read: {self.reason}")
        made.__cause__ = self.cause
        if self.cause is None:
            made.add_note(f"in the worker: {self.trace}")
        return made


class Reader(Protocol):
    """Reads batches of one endless order, ahead of their use."""

    def take(self, batch: Batch, seconds: float) -> Any:
        """The data of `batch`, which is the next one, or why it has none (`Failed`).

        Raises LoaderError when who reads it died, or gave nothing for so many seconds.
        """
        ...

    def close(self) -> None:
        """Stop reading and drop what was read."""
        ...


class ThreadReader:
    """A thread of this process, `ahead` batches ahead."""

    def __init__(self, batches: Iterator[Batch], load: Callable[[Batch], Any], ahead: int, pin: bool) -> None:
        self._batches, self._load, self._pin = batches, load, pin and torch.cuda.is_available()
        self._asked: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = False
        for batch in islice(batches, ahead):
            self._asked.put(batch)
        # A daemon: one that hangs in a read must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def take(self, batch: Batch, seconds: float) -> Any:
        """See `Reader`."""
        self._asked.put(next(self._batches))
        try:
            return self._read.get(timeout=seconds)
        except queue.Empty:
            raise silent(batch, seconds) from None

    def close(self) -> None:
        """See `Reader`; a read that hangs is left behind."""
        self._stopped = True
        self._asked.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (batch := self._asked.get()) is not None and not self._stopped:
            data = attempt(self._load, batch)
            self._read.put(data.pin_memory() if self._pin and hasattr(data, "pin_memory") else data)


class ProcessReader:
    """`loading.workers` processes, each `loading.ahead` batches ahead, through torch's DataLoader.

    They are forked from a server of their own, so that no thread, CUDA context or open file of training goes along.
    """

    def __init__(self, batches: Iterator[Batch], load: Callable[[Batch], Any], loading: Loading, pin: bool) -> None:
        self._poll = min(POLL_SECONDS, loading.timeout_seconds)
        context = multiprocessing.get_context("forkserver")
        # What takes seconds to import is imported once, by the server that workers are forked from.
        context.set_forkserver_preload(["torch.utils.data"])
        loader: DataLoader[Any] = DataLoader(
            _Loads(load),
            batch_size=None,
            sampler=_Order(batches),
            num_workers=loading.workers,
            prefetch_factor=loading.ahead,
            collate_fn=_as_it_is,
            pin_memory=pin and torch.cuda.is_available(),
            timeout=self._poll,
            multiprocessing_context=context,
            worker_init_fn=_ignore_stops,
            # Its seed for the workers must not come out of torch's global generator, which belongs to training.
            generator=torch.Generator(),
        )
        before = set(multiprocessing.active_children())
        self._loader: Any = iter(loader)
        self._workers = set(multiprocessing.active_children()) - before

    def take(self, batch: Batch, seconds: float) -> Any:
        """See `Reader`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return next(self._loader)
            except (RuntimeError, OSError, EOFError) as error:
                if "timed out" not in str(error):
                    raise ReaderLost(
                        f"{named(batch)} was being read when a worker of the loader died ({error}): look for the "
                        "kernel's out-of-memory killer, lower loading.workers or loading.ahead, and start again: "
                        "training goes on from its last checkpoint"
                    ) from error
            if time.monotonic() >= deadline:
                for worker in self._workers:
                    worker.kill()
                raise silent(batch, seconds)

    def close(self) -> None:
        """See `Reader`; workers end when the read that they are at has ended."""
        self._loader = None


def attempt(load: Callable[[Batch], Any], batch: Batch, keep: bool = True) -> Any:
    """The data of a batch, or why there is none; `keep` the exception itself."""
    try:
        return load(batch)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}", traceback.format_exc(), error if keep else None)


def named(batch: Batch) -> str:
    """A batch in words: its bucket, its place in the order, and its examples."""
    where = f"number {batch.position.index} of epoch {batch.position.epoch}"
    return f"batch {where}, bucket {batch.cell}, examples {', '.join(batch.ids)}"


def silent(batch: Batch, seconds: float) -> LoaderError:
    """The error of a reader that gave nothing for too long."""
    return ReaderLost(
        f"{named(batch)} has not been read within {seconds:g} seconds: look whether its files can be read at all "
        "(storage that hangs), or raise loading.timeout_seconds; training goes on from its last checkpoint"
    )


class _Loads(Dataset[Any]):
    """`load` as a dataset whose indices are batches."""

    def __init__(self, load: Callable[[Batch], Any]) -> None:
        self._load = load

    def __getitem__(self, batch: Batch) -> Any:
        return attempt(self._load, batch, keep=False)


class _Order:
    """An iterator as a sampler; it is used once."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches


def _as_it_is(data: Any) -> Any:
    return data


def _ignore_stops(worker: int) -> None:
    """A stop that is sent to the whole process group is the trainer's business: it still needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
