"""Batches of one shape each, in an order that depends on seed and epoch only, from any position.

A position is (epoch, index); nothing else is state, so that resuming is handing a position back. Nothing is dropped:
the last batch of a bucket is smaller when the bucket does not divide.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ml.batching.buckets import Cell

Data = TypeVar("Data")


class SamplerError(ValueError):
    """A sampler without examples, or a position that belongs to another sampler."""


@dataclass(frozen=True)
class Position:
    """Where in the stream of batches: epoch, and number of batches of it already handed out (over all data ranks)."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket that go through the model together."""

    cell: Cell
    ids: tuple[str, ...]
    position: Position


class BucketSampler:
    """Hands out batches of one bucket each; every data rank takes every `size`-th batch.

    `groups` are the ids in each bucket, `batch_sizes` the batch of each bucket. Raises SamplerError when there is no
    example at all.
    """

    def __init__(
        self,
        groups: Mapping[Cell, Sequence[str]],
        batch_sizes: Mapping[Cell, int],
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._groups = {cell: sorted(groups[cell]) for cell in sorted(groups) if groups[cell]}
        if not self._groups:
            raise SamplerError("no example falls in any bucket: look at the buckets of the stage and at its tier")
        self._batch_sizes = dict(batch_sizes)
        self.seed, self.rank, self.size = seed, rank, size
        self._epoch: tuple[int, list[tuple[Cell, tuple[str, ...]]]] | None = None

    def at(self, position: Position) -> tuple[Batch, Position]:
        """The batch of this rank at a position, and the position after it."""
        batches = self._batches(position.epoch)
        if position.index >= len(batches):
            return self.at(Position(position.epoch + 1, 0))
        cell, ids = batches[(position.index + self.rank) % len(batches)]
        return Batch(cell, ids, position), Position(position.epoch, position.index + self.size)

    def epoch_length(self) -> int:
        """Batches in one epoch, over all data ranks."""
        return len(self._batches(0))

    def num_examples(self) -> int:
        """Examples in one epoch."""
        return sum(map(len, self._groups.values()))

    def first_epoch(self) -> Iterator[Batch]:
        """The batches of the first epoch, of all data ranks, in order."""
        for index, (cell, ids) in enumerate(self._batches(0)):
            yield Batch(cell, ids, Position(0, index))

    def tails(self) -> dict[Cell, int]:
        """Size of the smaller last batch of every bucket that its batch size does not divide."""
        rest = {cell: len(ids) % self._batch_sizes[cell] for cell, ids in self._groups.items()}
        return {cell: number for cell, number in rest.items() if number}

    def _batches(self, epoch: int) -> list[tuple[Cell, tuple[str, ...]]]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1]

    def _shuffled(self, epoch: int) -> list[tuple[Cell, tuple[str, ...]]]:
        batches = []
        for cell, ids in self._groups.items():
            order = _rng(self.seed, epoch, str(cell)).permutation(len(ids))
            step = self._batch_sizes[cell]
            shuffled = [ids[i] for i in order]
            batches += [(cell, tuple(shuffled[i : i + step])) for i in range(0, len(ids), step)]
        return [batches[i] for i in _rng(self.seed, epoch, "order").permutation(len(batches))]


class BatchStream(Generic[Data]):
    """Batches with their data, loaded one ahead by a thread, from any position; counts which ids were consumed.

    `load` turns a Batch into its data and must depend on the Batch only. Close it, or use it as a context manager.
    """

    def __init__(self, sampler: BucketSampler, load: Callable[[Batch], Data]) -> None:
        self.sampler, self._load = sampler, load
        self._position = Position()
        self._ahead: Future[tuple[Batch, Data, Position]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self.consumed: Counter[str] = Counter()

    def __enter__(self) -> "BatchStream[Data]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> tuple[Batch, Data]:
        """The next batch and its data; a failure of `load` is raised here."""
        batch, data, self._position = (self._ahead or self._submit(self._position)).result()
        self._ahead = self._submit(self._position)
        self.consumed.update(batch.ids)
        return batch, data

    def state(self) -> dict[str, int]:
        """What `restore` needs to go on after the last batch handed out."""
        return {"seed": self.sampler.seed, "epoch": self._position.epoch, "index": self._position.index}

    def restore(self, state: Mapping[str, int], consumed: Mapping[str, int]) -> None:
        """Go on from a saved state; raises SamplerError when it was saved under another seed."""
        if state["seed"] != self.sampler.seed:
            raise SamplerError(f"position was saved under seed {state['seed']}, this sampler has {self.sampler.seed}")
        self._position = Position(state["epoch"], state["index"])
        self._ahead = None
        self.consumed = Counter(consumed)

    def close(self) -> None:
        """Stop loading ahead."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _submit(self, position: Position) -> Future[tuple[Batch, Data, Position]]:
        return self._worker.submit(self._fetch, position)

    def _fetch(self, position: Position) -> tuple[Batch, Data, Position]:
        batch, following = self.sampler.at(position)
        return batch, self._load(batch), following


def _rng(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))
