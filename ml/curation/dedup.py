"""Duplicates: the same picture twice, found by perceptual hash without comparing everything with everything."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import numpy.typing as npt

HASH_BITS = 64
MAX_BANDS = 16
BLOCK = 4096

Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]


def duplicates(hashes: list[str], ranks: npt.NDArray[np.float64], bits: int) -> dict[int, int]:
    """Which rows repeat which: index of the duplicate to index of the row that is kept.

    `hashes` are 16 hex digits; two rows are alike when at most `bits` of the 64 bits differ. Rows are taken by falling
    `ranks` (ties: first come), and each keeps its likes out, so a kept row never repeats another kept row and a dropped
    one always lies within `bits` of the row that stands for it.
    """
    values = np.array([int(text, 16) for text in hashes], dtype=np.uint64)
    unique, group = np.unique(values, return_inverse=True)
    near: dict[int, list[int]] = defaultdict(list)
    for a, b in pairs_within(unique, bits).tolist():
        near[a].append(b)
        near[b].append(a)
    keeper: dict[int, int] = {}
    found: dict[int, int] = {}
    for index in np.argsort(-ranks, kind="stable").tolist():
        own = int(group[index])
        kept = next((keeper[g] for g in (own, *near[own]) if g in keeper), None)
        if kept is None:
            keeper[own] = index
        else:
            found[index] = kept
    return found


def pairs_within(hashes: Hashes, bits: int) -> Pairs:
    """Index pairs [P, 2] (first below second) of hashes that differ in at most `bits` bits.

    With few bits the 64 are split into `bits + 1` bands: two hashes that near agree in at least one band, so only rows
    that share a band's value are compared. With more, blocks of rows are compared with all rows, in numpy.
    """
    everything = np.arange(len(hashes))
    if bits + 1 > MAX_BANDS:
        return _unique(_compare(hashes, everything, bits))
    candidates = [
        pair for band in _bands(hashes, bits + 1) for rows in _groups(band) for pair in _compare(hashes, rows, bits)
    ]
    return _unique(candidates)


def distance(a: str, b: str) -> int:
    """Bits that differ between two hashes of 16 hex digits."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def _bands(hashes: Hashes, count: int) -> list[Hashes]:
    edges = np.linspace(0, HASH_BITS, count + 1).round().astype(int).tolist()
    return [(hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges)]


def _groups(band: Hashes) -> list[Pairs]:
    """Rows that share a value, for every value that more than one row has."""
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.diff(band[order])) + 1
    return [rows for rows in np.split(order, starts) if len(rows) > 1]


def _compare(hashes: Hashes, rows: Pairs, bits: int) -> list[Pairs]:
    found = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        differing = np.bitwise_count(hashes[block][:, None] ^ hashes[rows][None, :])
        a, b = np.nonzero(differing <= bits)
        found.append(np.stack([block[a], rows[b]], axis=1))
    return found


def _unique(candidates: list[Pairs]) -> Pairs:
    if not candidates:
        return np.empty((0, 2), dtype=np.int64)
    pairs = np.concatenate(candidates)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)
