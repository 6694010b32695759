"""Gradients are averaged in one order on all ranks, though each rank's batch takes its own way through a network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.engines.make import make_engine
from ml.engines.protocol import Engine
from ml.methods import Engine as EngineSection
from ml.sections import Adam, Compute
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-6, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=0)
# Layers are of unlike sizes, so that a bucket in another order would not fit; a step takes four batches.
STEPS, BATCHES, WIDTHS = 6, 4, (5, 7, 9, 11)
# So few numbers fill a bucket that backward averages several times.
SMALL_BUCKET = 60

Ranks = Callable[..., list[Any]]


class Fork(nn.Module):
    """Every layer reads the input by itself; a batch passes through some of them, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList(nn.Linear(4, width) for width in WIDTHS)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor, ways: list[int]) -> Tensor:
        outs: list[Tensor] = [self.ways[way](x).square().mean() for way in ways]
        return torch.stack(outs).sum()


def ways_of(number: int) -> list[int]:
    """Even batches go one way round and odd ones the other; one layer is for every fourth batch alone."""
    ways = [0, 1, 2] if number % 2 else [2, 0]
    return [3, *ways] if number % BATCHES == 0 else ways


def train(over: dict[str, Any], count: int) -> Any:
    """Norms of all steps, full masters, updates of each weight, and the order that the ranks agreed on."""
    section = {"precision": "fp32", "grad_clip": 1.0, "sequence_parallel": 1, "checkpoint_blocks": (0, 0), **over}
    compute = Compute(accelerators="CPU:1", nodes=1, price="x", processes=count)
    engine: Any = make_engine(EngineSection.model_validate(section), compute)
    engine.setup(Fork(), adamw(ADAM), schedule(ADAM, STEPS))
    if count > 1:
        engine._boosted._reduce_bucket_size = SMALL_BUCKET
    norms = [step_of(engine, step) for step in range(STEPS)]
    found = norms, engine.gather(engine.masters()), engine.moments().updates
    order = list(engine._in_order._order) if count > 1 else None
    engine.close()
    return (*found, order)


def step_of(engine: Engine, step: int) -> float:
    mine = range(step * BATCHES + engine.data_rank, (step + 1) * BATCHES, engine.data_size)
    for number in mine:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        with engine.accumulate(last=number == mine[-1]):
            engine.backward(engine.model(x, ways_of(number)) / len(mine))
    return engine.step()


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_ranks_that_reach_unlike_weights_take_the_steps_of_one_process(ranks: Ranks, sharding: str) -> None:
    norms, masters, updates, _ = train({"kind": "plain", "accumulate": 4}, 1)
    found = ranks(train, {"kind": "colossal", "sharding": sharding, "accumulate": 2}, 2, count=2)
    assert found[0][3] == found[1][3]
    assert sorted(found[0][3]) == list(range(len(masters)))
    for rank in found:
        assert rank[0] == pytest.approx(norms, rel=1e-5)
        assert rank[2] == updates == {name: STEPS for name in masters if "unused" not in name}
    for name, master in found[0][1].items():
        torch.testing.assert_close(master, masters[name], rtol=1e-5, atol=1e-6)


def test_weights_are_averaged_in_the_order_in_which_the_main_rank_reached_them_first(ranks: Ranks) -> None:
    """Of batch 0 (layers 3, 2, 0) backward reaches the last layer first; batch 0 and 2 are the main rank's."""
    order = ranks(train, {"kind": "colossal", "sharding": "zero2", "accumulate": 2}, 2, count=2)[0][3]
    layers = [index // 2 for index in order]
    assert layers[:6] == [0, 0, 2, 2, 3, 3]
