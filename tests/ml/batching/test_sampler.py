from collections import Counter
from itertools import pairwise

import pytest

from ml.batching.buckets import Cell
from ml.batching.sampler import Batch, BatchStream, BucketSampler, Position, SamplerError
from ml.shapes import Size

SMALL, LARGE = Cell("64px", 1, Size(48, 80)), Cell("64px", 17, Size(48, 80))
GROUPS = {SMALL: [f"s{i}" for i in range(10)], LARGE: [f"l{i}" for i in range(7)]}
SIZES = {SMALL: 4, LARGE: 3}


def sampler(seed: int = 0, rank: int = 0, size: int = 1) -> BucketSampler:
    return BucketSampler(GROUPS, SIZES, seed, rank, size)


def walk(source: BucketSampler, start: Position, count: int) -> list[Batch]:
    batches = []
    for _ in range(count):
        batch, start = source.at(start)
        batches.append(batch)
    return batches


def test_an_epoch_hands_out_every_example_once_in_batches_of_one_shape() -> None:
    source = sampler()
    batches = walk(source, Position(), source.epoch_length())
    assert source.epoch_length() == 3 + 3
    assert Counter(i for b in batches for i in b.ids) == Counter([*GROUPS[SMALL], *GROUPS[LARGE]])
    assert all(set(b.ids) <= set(GROUPS[b.cell]) for b in batches)
    assert sorted(len(b.ids) for b in batches if b.cell == SMALL) == [2, 4, 4]
    assert source.tails() == {SMALL: 2, LARGE: 1}
    assert [b.ids for b in source.first_epoch()] == [b.ids for b in batches]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one, again, other = (walk(sampler(seed), Position(), 12) for seed in (0, 0, 1))
    assert one == again
    assert [b.ids for b in one] != [b.ids for b in other]
    assert [b.ids for b in one[:6]] != [b.ids for b in one[6:]]
    assert [b.position.epoch for b in one] == [0] * 6 + [1] * 6


def test_shapes_are_mixed_within_an_epoch() -> None:
    cells = [b.cell for seed in range(5) for b in walk(sampler(seed), Position(), 6)]
    assert sum(a != b for a, b in pairwise(cells)) > 5


def test_any_position_continues_as_if_nothing_had_happened() -> None:
    straight = walk(sampler(), Position(), 15)
    for cut in (1, 5, 6, 7, 11):
        assert walk(sampler(), straight[cut].position, 15 - cut) == straight[cut:]


def test_ranks_take_different_batches_and_stay_in_step() -> None:
    ranks = [walk(sampler(rank=rank, size=2), Position(), 6) for rank in (0, 1)]
    together = [i for pair in zip(*ranks, strict=True) for b in pair for i in b.ids]
    assert Counter(together) == Counter(i for b in walk(sampler(), Position(), 12) for i in b.ids)
    assert [b.position for b in ranks[0]] == [b.position for b in ranks[1]]


def test_no_example_at_all_is_an_error() -> None:
    with pytest.raises(SamplerError, match="no example falls in any bucket"):
        BucketSampler({SMALL: []}, SIZES, 0)


def test_a_stream_resumes_after_the_last_batch_consumed_and_keeps_its_ledger() -> None:
    """Batches are loaded ahead; what was loaded and not handed out must not count."""
    with BatchStream(sampler(), lambda batch: batch.ids) as straight:
        wanted = [straight.next() for _ in range(10)]
        ledger = straight.consumed
    with BatchStream(sampler(), lambda batch: batch.ids) as first:
        got = [first.next() for _ in range(4)]
        state, consumed = first.state(), dict(first.consumed)
    with BatchStream(sampler(), lambda batch: batch.ids) as second:
        second.restore(state, consumed)
        got += [second.next() for _ in range(6)]
        assert second.consumed == ledger
    assert got == wanted


def test_a_stream_raises_what_loading_raised_and_refuses_another_seed() -> None:
    def fail(batch: Batch) -> None:
        raise OSError(f"cannot read {batch.ids[0]}")

    with BatchStream(sampler(), fail) as stream, pytest.raises(OSError, match="cannot read"):
        stream.next()
    with BatchStream(sampler(seed=3), fail) as stream, pytest.raises(SamplerError, match="seed 0, this sampler has 3"):
        stream.restore({"seed": 0, "epoch": 0, "index": 0}, {})
