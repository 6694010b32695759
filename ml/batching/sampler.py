"""Batches of one shape each, in one order that depends on the seed only, from any position, for any number of ranks.

Epochs are laid end to end: batch number n of an order with L batches an epoch has the position (n // L, n % L). From
position n on, data rank r of `size` takes number n + r, and all go on at n + size; so what is handed out does not
depend on how many share it. A position, with the batches that are passed over, is all the state there is. Nothing is
dropped: the last batch of a bucket is smaller when the bucket does not divide.

Batches in `skipped` (those that spoiled a step) take no turn: the order is counted over the others, so that every step
is full on every number of ranks.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ml.batching.buckets import Cell


class SamplerError(ValueError):
    """A sampler without examples, or a state that belongs to another sampler."""


@dataclass(frozen=True, order=True)
class Position:
    """Where in the order: epoch, and number of batches of it before this one (over all data ranks)."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket that go through the model together, and their own place in the order."""

    cell: Cell
    ids: tuple[str, ...]
    position: Position


class BucketSampler:
    """Hands out batches of one bucket each; data ranks take turns.

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
        self.skipped: frozenset[Position] = frozenset()
        self._epochs: dict[int, list[tuple[Cell, tuple[str, ...]]]] = {}

    def at(self, position: Position) -> tuple[Batch, Position]:
        """This rank's batch where all ranks stand at `position`, and where they stand after it."""
        own = self.advance(position, self.rank)
        cell, ids = self._batches(own.epoch)[own.index]
        return Batch(cell, ids, own), self.advance(position, self.size)

    def advance(self, position: Position, count: int) -> Position:
        """Whose turn it is `count` turns after that of `position` (0: the first from there on that is not skipped)."""
        length = self.epoch_length()
        number = position.epoch * length + position.index
        while True:
            place = Position(*divmod(number, length))
            if place not in self.skipped:
                if count == 0:
                    return place
                count -= 1
            number += 1

    def state(self, position: Position) -> dict[str, Any]:
        """What `restore` needs to go on at a position: plain data."""
        ahead = sorted(place for place in self.skipped if place >= position)
        return {
            "seed": self.seed,
            "epoch": position.epoch,
            "index": position.index,
            "skipped": [[place.epoch, place.index] for place in ahead],
            "order": self._order,
        }

    def restore(self, state: Mapping[str, Any]) -> Position:
        """Where to go on; what the state skips is skipped, and so is all that was skipped here before.

        Raises SamplerError when the state was saved under another seed or over other examples.
        """
        if state["seed"] != self.seed:
            raise SamplerError(f"position was saved under seed {state['seed']}, this sampler has {self.seed}")
        if state["order"] != self._order:
            raise SamplerError(
                "position was saved over other examples or batch sizes: train on the same data, or into another folder"
            )
        self.skipped |= {Position(epoch, index) for epoch, index in state["skipped"]}
        return Position(state["epoch"], state["index"])

    def epoch_length(self) -> int:
        """Batches in one epoch, over all data ranks."""
        return sum(-(-len(ids) // self._batch_sizes[cell]) for cell, ids in self._groups.items())

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

    @cached_property
    def _order(self) -> str:
        """Digest of what decides the order beside the seed."""
        digest = hashlib.sha256()
        for cell, ids in self._groups.items():
            digest.update(f"{cell}\x1f{self._batch_sizes[cell]}\x1e".encode())
            digest.update("\x1f".join(ids).encode())
        return digest.hexdigest()[:16]

    def _batches(self, epoch: int) -> list[tuple[Cell, tuple[str, ...]]]:
        # A thread that reads ahead asks for the next epoch while this one is still asked for.
        if (found := self._epochs.get(epoch)) is None:
            found = self._shuffled(epoch)
            near = {other: order for other, order in self._epochs.copy().items() if abs(other - epoch) == 1}
            self._epochs = {**near, epoch: found}
        return found

    def _shuffled(self, epoch: int) -> list[tuple[Cell, tuple[str, ...]]]:
        batches = []
        for cell, ids in self._groups.items():
            order = _rng(self.seed, epoch, str(cell)).permutation(len(ids))
            step = self._batch_sizes[cell]
            shuffled = [ids[i] for i in order]
            batches += [(cell, tuple(shuffled[i : i + step])) for i in range(0, len(ids), step)]
        return [batches[i] for i in _rng(self.seed, epoch, "order").permutation(len(batches))]


def _rng(*parts: object) -> np.random.Generator:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))
