"""Reading ahead, by a thread and by worker processes: one order, and errors that say what was being read."""

from operator import attrgetter
from pathlib import Path

import pytest
import torch

from ml.batching.buckets import Cell
from ml.batching.datasets import LatentDataset, batch_sizes
from ml.batching.readers import LoaderError
from ml.batching.sampler import BucketSampler
from ml.batching.stream import BatchStream
from ml.methods import Loading
from ml.recipe import Recipe
from ml.shapes import Size

SMALL, LARGE = Cell("64px", 1, Size(48, 80)), Cell("64px", 17, Size(48, 80))
GROUPS = {SMALL: [f"s{i}" for i in range(10)], LARGE: [f"l{i}" for i in range(7)]}
SIZES = {SMALL: 4, LARGE: 3}
THREAD, PROCESSES = Loading(), Loading(workers=2)
IDS = attrgetter("ids")


def sampler(seed: int = 0, rank: int = 0, size: int = 1) -> BucketSampler:
    return BucketSampler(GROUPS, SIZES, seed, rank, size)


@pytest.mark.parametrize("loading", [THREAD, PROCESSES], ids=["thread", "processes"])
def test_batches_come_in_the_samplers_order_and_go_on_from_any_state(loading: Loading) -> None:
    """What was read ahead and not handed out does not count."""
    with BatchStream(sampler(), IDS, loading) as straight:
        wanted = [straight.next() for _ in range(10)]
    assert [(batch.ids, batch.ids) for batch, _ in wanted] == [(batch.ids, data) for batch, data in wanted]
    assert [batch for batch, _ in wanted[:6]] == list(sampler().first_epoch())
    with BatchStream(sampler(), IDS, loading) as first:
        got = [first.next() for _ in range(4)]
        state = first.state()
        first.next()
        first.restore(state)
        assert first.next() == wanted[4]
    with BatchStream(sampler(), IDS, loading) as second:
        second.restore(state)
        got += [second.next() for _ in range(6)]
        assert second.waited > 0
    assert got == wanted


def test_latents_read_by_workers_are_those_that_a_thread_reads(latents: Path, mini: Recipe) -> None:
    """The dataset goes to the workers without its open files, whatever was read of it before."""
    data = LatentDataset(latents)
    groups = data.groups("train", "stage1")
    order = BucketSampler(groups, batch_sizes(groups, mini.stage("stage1")), 3)
    data.load(groups[min(groups)][:1])
    with BatchStream(order, data.of_batch, PROCESSES) as workers, BatchStream(order, data.of_batch) as thread:
        for _ in range(5):
            (one, here), (two, there) = thread.next(), workers.next()
            assert one == two
            assert torch.equal(here.latents, there.latents)
            assert torch.equal(here.text.context, there.text.context)
            assert (here.heads is None) == (there.heads is None)


def test_reading_with_workers_leaves_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with BatchStream(sampler(), IDS, PROCESSES) as stream:
        stream.next()
    assert torch.equal(torch.rand(3), wanted)


def test_skipped_batches_never_come_again_on_any_rank() -> None:
    wanted = list(sampler().first_epoch())
    left = []
    for rank in (0, 1):
        with BatchStream(sampler(rank=rank, size=2), IDS) as stream:
            start = stream.state()
            stream.next()
            second = stream.next()[0]
            stream.restore(start)
            stream.skip([second])
            left.append([stream.next()[0] for _ in range(2)])
    assert [left[0][0], left[1][0], left[0][1], left[1][1]] == [wanted[i] for i in (0, 1, 4, 5)]
    with BatchStream(sampler(), IDS) as stream, pytest.raises(LoaderError, match="cannot skip"):
        stream.skip([second])
