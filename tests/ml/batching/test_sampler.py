import itertools
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from ml.batching.buckets import Cell
from ml.batching.sampler import Batch, BucketSampler, Position, SamplerError
from ml.shapes import Size

SMALL, LARGE = Cell("64px", 1, Size(48, 80)), Cell("64px", 17, Size(48, 80))
GROUPS = {SMALL: [f"s{i}" for i in range(10)], LARGE: [f"l{i}" for i in range(7)]}
SIZES = {SMALL: 4, LARGE: 3}
LENGTH = 6


def sampler(seed: int = 0, rank: int = 0, size: int = 1) -> BucketSampler:
    return BucketSampler(GROUPS, SIZES, seed, rank, size)


def walk(source: BucketSampler, start: Position, count: int) -> list[Batch]:
    batches = []
    for _ in range(count):
        batch, start = source.at(start)
        batches.append(batch)
    return batches


def turn(state: dict[str, object], size: int) -> tuple[list[Batch], dict[str, object]]:
    """One turn of `size` ranks that go on from a saved state, as new processes would; the state after it."""
    batches, states = [], []
    for rank in range(size):
        source = sampler(rank=rank, size=size)
        batch, after = source.at(source.restore(json.loads(json.dumps(state))))
        batches.append(batch)
        states.append(source.state(after))
    assert all(other == states[0] for other in states)
    return batches, states[0]


def test_an_epoch_hands_out_every_example_once_in_batches_of_one_shape() -> None:
    source = sampler()
    batches = walk(source, Position(), source.epoch_length())
    assert source.epoch_length() == LENGTH
    assert Counter(i for b in batches for i in b.ids) == Counter([*GROUPS[SMALL], *GROUPS[LARGE]])
    assert all(set(b.ids) <= set(GROUPS[b.cell]) for b in batches)
    assert sorted(len(b.ids) for b in batches if b.cell == SMALL) == [2, 4, 4]
    assert source.tails() == {SMALL: 2, LARGE: 1}
    assert source.num_examples() == 17
    assert list(source.first_epoch()) == batches


def test_epochs_and_seeds_differ_and_repeat() -> None:
    one, again, other = (walk(sampler(seed), Position(), 12) for seed in (0, 0, 1))
    assert one == again
    assert [b.ids for b in one] != [b.ids for b in other]
    assert [b.ids for b in one[:6]] != [b.ids for b in one[6:]]
    assert [b.position for b in one] == [Position(epoch, index) for epoch in (0, 1) for index in range(LENGTH)]


def test_shapes_are_mixed_within_an_epoch() -> None:
    cells = [b.cell for seed in range(5) for b in walk(sampler(seed), Position(), 6)]
    assert sum(a != b for a, b in itertools.pairwise(cells)) > 5


def test_any_position_continues_as_if_nothing_had_happened() -> None:
    straight = walk(sampler(), Position(), 15)
    for cut in (1, 5, 6, 7, 11):
        assert walk(sampler(), straight[cut].position, 15 - cut) == straight[cut:]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 13])
def test_ranks_share_one_order_over_the_ends_of_epochs(size: int) -> None:
    """4 ranks do not divide 6 batches, 7 and 13 are more than an epoch has."""
    straight = walk(sampler(), Position(), 5 * size)
    ranks = [walk(sampler(rank=rank, size=size), Position(), 5) for rank in range(size)]
    assert [batch for together in zip(*ranks, strict=True) for batch in together] == straight


@pytest.mark.parametrize("seed", range(8))
def test_ranks_that_come_and_go_neither_repeat_nor_drop_a_batch(seed: int) -> None:
    draws = random.Random(seed)
    taken: list[Batch] = []
    state: dict[str, object] = sampler().state(Position())
    while len(taken) < 4 * LENGTH:
        size = draws.choice((1, 2, 3, 4))
        for _ in range(draws.randint(1, 3)):
            batches, state = turn(state, size)
            taken += batches
    assert taken == walk(sampler(), Position(), len(taken))


@pytest.mark.parametrize("seed", range(8))
def test_skipped_batches_take_no_turn_on_any_number_of_ranks(seed: int) -> None:
    draws = random.Random(seed)
    skipped = frozenset(Position(*divmod(n, LENGTH)) for n in draws.sample(range(3 * LENGTH), 7))
    source = sampler()
    source.skipped = skipped
    taken: list[Batch] = []
    state = source.state(Position())
    assert len(state["skipped"]) == 7
    while len(taken) < 5 * LENGTH:
        batches, state = turn(state, draws.choice((1, 2, 3, 4)))
        taken += batches
    everything = walk(sampler(), Position(), len(taken) + len(skipped))
    assert taken == [batch for batch in everything if batch.position not in skipped]
    assert state["skipped"] == [], "what lies behind is no longer state"


def test_a_sampler_that_goes_back_keeps_what_it_has_skipped() -> None:
    source = sampler()
    start = source.state(Position())
    source.skipped |= {Position(0, 0), Position(0, 2)}
    batches = walk(source, source.restore(start), 2)
    assert [batch.position for batch in batches] == [Position(0, 1), Position(0, 3)]


def test_a_state_of_another_seed_or_of_other_examples_is_refused() -> None:
    state = sampler().state(Position(1, 2))
    assert sampler().restore(state) == Position(1, 2)
    with pytest.raises(SamplerError, match="seed 0, this sampler has 3"):
        sampler(seed=3).restore(state)
    for groups, sizes in ((GROUPS | {SMALL: ["s0"]}, SIZES), (GROUPS, SIZES | {LARGE: 2})):
        with pytest.raises(SamplerError, match="other examples or batch sizes"):
            BucketSampler(groups, sizes, 0).restore(state)


def test_two_threads_may_stand_in_different_epochs() -> None:
    source, wanted = sampler(), walk(sampler(), Position(), 8 * LENGTH)
    with ThreadPoolExecutor(max_workers=4) as threads:
        starts = [batch.position for batch in wanted] * 20
        found = list(threads.map(lambda position: source.at(position)[0], starts))
    assert found == wanted * 20


def test_no_example_at_all_is_an_error() -> None:
    with pytest.raises(SamplerError, match="no example falls in any bucket"):
        BucketSampler({SMALL: []}, SIZES, 0)
