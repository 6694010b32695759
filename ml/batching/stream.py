"""Batches with their data, read ahead of the training step: by a thread, or by processes of their own.

Batches come in the sampler's order however they are read; the position of the stream is that of the last batch handed
out, so that what was read ahead and not used is no part of its state.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from ml.batching.readers import Failed, LoaderError, ProcessReader, Reader, ThreadReader, named
from ml.batching.sampler import Batch, BucketSampler, Position
from ml.methods import Loading

Data = TypeVar("Data")
# Batches handed out that `skip` can still pass over.
REMEMBERED = 1024


class BatchStream(Generic[Data]):
    """Batches with their data, from any position; close it, or use it as a context manager.

    `load` turns a Batch into its data and must depend on the Batch only; where `loading` asks for workers it is sent to
    them, so it must be something that pickle takes (a method of a dataset, no lambda). `pin` puts the data into
    page-locked memory, if there is a GPU to copy from there. `waited` counts the seconds that `next` took.
    """

    def __init__(
        self,
        sampler: BucketSampler,
        load: Callable[[Batch], Data],
        loading: Loading = Loading(),
        pin: bool = False,
    ) -> None:
        self.sampler, self.waited = sampler, 0.0
        self._load, self._loading, self._pin = load, loading, pin
        self._position = Position()
        self._reader: Reader | None = None
        self._handed: deque[tuple[Batch, Position, Position]] = deque(maxlen=REMEMBERED)

    def __enter__(self) -> "BatchStream[Data]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> tuple[Batch, Data]:
        """The next batch and its data.

        Raises LoaderError, naming the batch, when reading it failed, or when its reader died or fell silent.
        """
        started = time.perf_counter()
        batch, following = self.sampler.at(self._position)
        if self._reader is None:
            self._reader = self._new_reader()
        try:
            data = self._reader.take(batch, self._loading.timeout_seconds)
        except LoaderError:
            self.close()
            raise
        if isinstance(data, Failed):
            raise data.error(batch)
        self._handed.append((batch, self._position, following))
        self._position = following
        self.waited += time.perf_counter() - started
        return batch, data

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on after the last batch handed out."""
        return self.sampler.state(self._position)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was read ahead is dropped.

        Raises SamplerError when the state was saved under another seed or over other examples.
        """
        self.close()
        self._position = self.sampler.restore(state)

    def skip(self, batches: Iterable[Batch]) -> None:
        """Never hand out these batches again, nor those that other data ranks took in the same turns.

        All ranks must give the batches of the same steps. Raises LoaderError for one handed out too long ago.
        """
        turns = {batch.position: (before, after) for batch, before, after in self._handed}
        places: set[Position] = set()
        for batch in batches:
            if batch.position not in turns:
                raise LoaderError(f"{named(batch)} was handed out more than {REMEMBERED} batches ago: cannot skip it")
            places |= set(self._between(*turns[batch.position]))
        self.close()
        self.sampler.skipped |= places

    def close(self) -> None:
        """Stop reading ahead; `next` starts again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _new_reader(self) -> Reader:
        batches = self._batches(self._position)
        if self._loading.workers == 0:
            return ThreadReader(batches, self._load, self._loading.ahead, self._pin)
        return ProcessReader(batches, self._load, self._loading, self._pin)

    def _batches(self, position: Position) -> Iterator[Batch]:
        while True:
            batch, position = self.sampler.at(position)
            yield batch

    def _between(self, before: Position, after: Position) -> Iterator[Position]:
        """The positions from one to before another."""
        length = self.sampler.epoch_length()
        first, last = (place.epoch * length + place.index for place in (before, after))
        return (Position(*divmod(number, length)) for number in range(first, last))
