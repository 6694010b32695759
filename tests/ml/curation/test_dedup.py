import time

import numpy as np
import pytest

from ml.curation.dedup import distance, duplicates, pairs_within


def brute(hashes: np.ndarray, bits: int) -> set[tuple[int, int]]:
    values = hashes.tolist()
    return {
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= bits
    }


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 10, 15, 20, 40])
def test_bands_find_exactly_the_pairs_that_comparing_all_finds(bits):
    rng = np.random.default_rng(bits)
    base = rng.integers(0, 2**63, 40, dtype=np.uint64)
    flips = [int(v) ^ sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 12), replace=False)) for v in base]
    hashes = np.array([*base.tolist(), *flips], dtype=np.uint64)
    assert {tuple(pair) for pair in pairs_within(hashes, bits).tolist()} == brute(hashes, bits)


def test_a_kept_row_never_repeats_another_and_stands_within_reach_of_its_duplicates():
    rng = np.random.default_rng(7)
    seeds = rng.integers(0, 2**63, 10, dtype=np.uint64).tolist()
    hashes = [f"{seed ^ (1 << int(b)) ^ (1 << int(c)):016x}" for seed in seeds for b, c in rng.integers(0, 64, (20, 2))]
    ranks = rng.random(len(hashes))
    found = duplicates(hashes, ranks, 3)
    kept = [i for i in range(len(hashes)) if i not in found]
    assert all(distance(hashes[a], hashes[b]) > 3 for a in kept for b in kept if a != b)
    for repeated, stands in found.items():
        assert stands in kept
        assert distance(hashes[repeated], hashes[stands]) <= 3
        assert ranks[stands] >= ranks[repeated]


def test_the_higher_rank_stays_and_a_tie_goes_to_the_first():
    same = ["00ff00ff00ff00ff"] * 3
    assert duplicates(same, np.array([1.0, 9.0, 5.0]), 0) == {0: 1, 2: 1}
    assert duplicates(same, np.array([1.0, 1.0, 1.0]), 0) == {1: 0, 2: 0}


def test_likeness_is_no_chain():
    """a~b and b~c, but not a~c: where b is dropped for a, c stays."""
    assert duplicates([f"{v:016x}" for v in (0b0, 0b11, 0b1111)], np.array([3.0, 2.0, 1.0]), 2) == {1: 0}


def test_nothing_and_one():
    assert duplicates([], np.array([]), 3) == {}
    assert duplicates(["0" * 16], np.array([1.0]), 3) == {}


def test_a_hundred_thousand_hashes_and_ten_thousand_equal_ones_take_seconds():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    values[:10_000] = 5
    start = time.process_time()
    found = duplicates([f"{v:016x}" for v in values.tolist()], rng.random(len(values)), 3)
    assert time.process_time() - start < 15
    assert len(found) >= 9_999
