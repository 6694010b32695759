"""What a thread and worker processes say of a batch that cannot be read."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from ml.batching.buckets import Cell
from ml.batching.readers import Failed, LoaderError, ProcessReader, Reader, ThreadReader, attempt, named
from ml.batching.sampler import Batch, BucketSampler, Position
from ml.methods import Loading
from ml.shapes import Size

CELL = Cell("64px", 17, Size(48, 80))
ORDER = list(BucketSampler({CELL: [f"l{i}" for i in range(8)]}, {CELL: 2}, 0).first_epoch())
BAD = ORDER[2]


class Sent:
    """A function of this module for a process that cannot import it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, batch: Batch) -> Any:
        return self.function(batch)

    def __reduce__(self) -> Any:
        return cloudpickle.loads, (cloudpickle.dumps(self.function),)


def failing(how: str) -> Callable[[Batch], Any]:
    """Reads the ids of a batch, and does something else where the third batch is asked for."""
    bad = BAD.ids

    def load(batch: Any) -> Any:
        if batch.ids == bad and how == "raise":
            raise OSError("the disk is gone")
        if batch.ids == bad and how == "die":
            os.kill(os.getpid(), 9)
        if batch.ids == bad:
            time.sleep(60)
        return batch.ids

    return Sent(load)


def endless() -> Iterator[Batch]:
    while True:
        yield from ORDER


def reader(how: str, workers: int) -> Reader:
    load = failing(how)
    if workers:
        return ProcessReader(endless(), load, Loading(workers=workers), pin=False)
    return ThreadReader(endless(), load, ahead=2, pin=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_arrives_with_its_own_words_and_reading_goes_on(workers: int) -> None:
    found = reader("raise", workers)
    assert [found.take(batch, 60) for batch in ORDER[:2]] == [batch.ids for batch in ORDER[:2]]
    failed = found.take(BAD, 60)
    assert isinstance(failed, Failed)
    error = failed.error(BAD)
    assert str(error) == f"{named(BAD)} could not be read: OSError: the disk is gone"
    assert "examples " + ", ".join(BAD.ids) in named(BAD)
    assert "bucket 64px/48x80/17" in named(BAD)
    # The exception itself where it is at hand, else where it was raised.
    assert isinstance(error.__cause__, OSError) == (workers == 0)
    assert any("in load" in note for note in getattr(error, "__notes__", ["in load"]))
    assert found.take(ORDER[3], 60) == ORDER[3].ids
    found.close()


def test_a_worker_that_is_killed_is_named_with_what_was_waited_for() -> None:
    """It reads ahead, so it may die before the batches in front of the one that kills it have been handed over."""
    found, started = reader("die", 2), time.monotonic()
    with pytest.raises(LoaderError, match=r"worker .* died .*loading\.workers") as caught:  # noqa: PT012
        for asked in endless():
            assert found.take(asked, 600) == asked.ids
    assert str(caught.value).startswith(f"{named(asked)} was being read")
    assert asked in ORDER[:3]
    assert time.monotonic() - started < 60, "long before the reader would be given up"
    found.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_falls_silent_is_given_up(workers: int) -> None:
    found = reader("sleep", workers)
    assert [found.take(batch, 60) for batch in ORDER[:2]] == [batch.ids for batch in ORDER[:2]]
    started = time.monotonic()
    with pytest.raises(LoaderError, match=rf"examples {', '.join(BAD.ids)} has not been read within 1 seconds"):
        found.take(BAD, 1)
    assert time.monotonic() - started < 30
    found.close()
    assert time.monotonic() - started < 45


def test_what_is_kept_of_a_failure() -> None:
    batch = Batch(CELL, (BAD.ids[0],), Position())

    def load(_: Batch) -> None:
        raise KeyError("x")

    kept, plain = attempt(load, batch), attempt(load, batch, keep=False)
    assert isinstance(kept.cause, KeyError)
    assert plain.cause is None
    assert kept == Failed("KeyError: 'x'", kept.trace)


def test_a_stop_of_the_whole_process_group_leaves_workers_at_work() -> None:
    """The trainer that is asked to stop still finishes its step, and the next may be needed by other ranks."""
    found = ProcessReader(endless(), failing("raise"), Loading(workers=2), pin=False)
    assert [found.take(batch, 60) for batch in ORDER[:2]] == [batch.ids for batch in ORDER[:2]], "both have started"
    assert len(found._workers) == 2
    for worker in found._workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert isinstance(found.take(BAD, 60), Failed)
    for asked in (ORDER[3], *ORDER[:2]):
        assert found.take(asked, 60) == asked.ids
    found.close()
    for worker in found._workers:
        worker.join(30)
        assert not worker.is_alive()
