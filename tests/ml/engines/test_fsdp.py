import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ml.engines.fsdp import FsdpEngine, leaves
from ml.engines.plain import PlainEngine
from ml.engines.protocol import Moments
from ml.engines.world import World
from ml.methods import Engine
from ml.sections import Adam
from ml.training.ema import EMA
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-6, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=3)
CPU = torch.device("cpu")
Ranks = Callable[..., list[Any]]


class Forked(nn.Module):
    """Two ways in, of which a batch takes one or both; a way that none takes; blocks of one and of three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 1)])

    def forward(self, x: Tensor, both: bool) -> Tensor:
        x = self.always(x) + self.sometimes(x) if both else self.always(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Halves:
    """A weight cut by rows."""

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards))

    def take(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size)[rank]


class Separable(nn.Module):
    """Squares of the distances from a target: a rank that holds some rows of `cut` has the gradient of these."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.whole = nn.Parameter(torch.arange(18.0).view(6, 3)), nn.Parameter(torch.arange(3.0))

    def forward(self, target: float) -> Tensor:
        return (self.cut - target).square().sum() + (self.whole - target).square().sum()


def section(tensor: int = 1, dtype: str = "fp32") -> Engine:
    return Engine(
        kind="plain",
        precision=dtype,
        grad_clip=0.5,
        accumulate=2,
        sequence_parallel=1,
        tensor_parallel=tensor,
        checkpoint_blocks=(0, 0),
    )


def made(kind: type[PlainEngine], dtype: torch.dtype = torch.float32) -> PlainEngine:
    torch.manual_seed(0)
    engine = kind(CPU, dtype, 0.5, World.join(section(), CPU))
    engine.setup(Forked(), adamw(ADAM), schedule(ADAM, 10))
    return engine


def forked(kind: type[PlainEngine], steps: int = 6) -> tuple[list[float], dict[str, Tensor], dict[str, int]]:
    """Of the four batches of a step, one takes both ways: another one in every step, the first micro-batch or not."""
    engine, norms = made(kind), []
    for step in range(steps):
        mine = range(engine.data_rank, 4, engine.data_size)
        for number in mine:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(4 * step + number))
            with engine.accumulate(last=number == mine[-1]):
                engine.backward(engine.model(x, both=number == step % 5).square().mean() / len(mine))
        norms.append(engine.step())
    masters, moments = engine.gather(engine.masters()), engine.moments()
    engine.gather(moments.mean)
    engine.close()
    return norms, masters, dict(moments.updates)


@pytest.mark.parametrize("kind", [PlainEngine, FsdpEngine])
def test_replicas_may_reach_different_weights(ranks: Ranks, kind: type[PlainEngine]) -> None:
    """One that no replica reached in a step is not updated in it, as in one process."""
    norms, masters, updates = forked(PlainEngine)
    assert updates == {name: 5 if "sometimes" in name else 6 for name in masters if "never" not in name}
    found_norms, found, found_updates = ranks(forked, kind)[0]
    assert found_norms == pytest.approx(norms, rel=1e-5)
    assert found_updates == updates
    for name, master in masters.items():
        torch.testing.assert_close(found[name], master, rtol=1e-5, atol=1e-6)


def uneven(dtype: torch.dtype) -> dict[str, Any]:
    """Shards, their average, and what comes back of gathering and scattering, on every rank."""
    engine = made(FsdpEngine, dtype)
    ema = EMA(engine.masters(), 0.5)
    before = engine.gather(engine.masters())
    engine.backward(engine.model(torch.ones(1, 3).to(dtype), both=True).sum())
    engine.step()
    ema.update(engine.masters())
    full, average = engine.gather(engine.masters()), engine.gather(ema.shards)
    parts = engine.gather(engine.masters(), spread=True)
    everything = engine.collect({name: tensor.tolist() for name, tensor in parts.items()})
    joined = {name: torch.tensor(values) for part in everything for name, values in part.items()}
    scattered = engine.scatter(joined)
    same = all(torch.equal(scattered[name], shard) for name, shard in engine.masters().items())
    engine.close()
    return {
        "shapes": {name: tuple(shard.shape) for name, shard in engine.masters().items()},
        "dtypes": {shard.dtype for shard in engine.masters().values()},
        "full": full,
        "halfway": {name: torch.lerp(before[name], full[name], 0.5) for name in full},
        "average": average,
        "names": list(parts),
        "joined": joined,
        "same": same,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_may_be_uneven_or_empty(ranks: Ranks, dtype: torch.dtype) -> None:
    main, other = ranks(uneven, dtype)
    assert main["shapes"]["blocks.0.weight"] == (2, 5)
    assert other["shapes"]["blocks.0.weight"] == (1, 5)
    assert main["shapes"]["blocks.1.bias"] == (1,)
    assert other["shapes"]["blocks.1.bias"] == (0,)
    assert main["dtypes"] == other["dtypes"] == {torch.float32}
    assert main["same"]
    assert other["same"]
    assert other["full"] == other["average"] == {}
    assert main["full"]["blocks.0.weight"].shape == (3, 5)
    for name, full in main["full"].items():
        assert torch.equal(main["joined"][name], full)
        torch.testing.assert_close(main["average"][name], main["halfway"][name])
    assert sorted([*main["names"], *other["names"]]) == sorted(main["full"])
    held = [sum(main["full"][name].numel() for name in each["names"]) for each in (main, other)]
    assert max(held) < 0.7 * sum(held)


def cut(kind: type[PlainEngine]) -> tuple[list[float], dict[str, Tensor], bool]:
    """Three steps with the rows of one weight over two tensor ranks; then there and back."""
    world = World.join(section(tensor=2), CPU)

    def prepare(network: nn.Module) -> Mapping[str, Halves]:
        network.cut = nn.Parameter(Halves().take(network.get_parameter("cut").data, world.tensor_rank, 2).clone())
        return {"cut": Halves()}

    engine = kind(CPU, torch.float32, 0.5, world, prepare)
    engine.setup(Separable(), adamw(ADAM), schedule(ADAM, 10))
    norms = []
    for _ in range(3):
        engine.backward(engine.model(1.0 + engine.data_rank))
        norms.append(engine.step())
    masters, live = engine.gather(engine.masters()), engine.moments()
    full = [{**part} for given in (engine.masters(), live.mean, live.square) for part in [everywhere(engine, given)]]
    before = {name: shard.clone() for name, shard in engine.masters().items()}
    engine.backward(engine.model(9.0))
    engine.step()
    engine.restore(full[0], Moments(full[1], full[2], live.updates), 3)
    same = all(torch.equal(shard, before[name]) for name, shard in engine.masters().items())
    engine.close()
    return norms, masters, same


def everywhere(engine: PlainEngine, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = engine.collect({name: tensor.tolist() for name, tensor in engine.gather(shards, spread=True).items()})
    return {name: torch.tensor(values) for part in parts for name, values in part.items()}


@pytest.mark.parametrize(("kind", "count"), [(PlainEngine, 2), (PlainEngine, 4), (FsdpEngine, 4)])
def test_cut_weights_count_once_in_the_norm(ranks: Ranks, kind: type[PlainEngine], count: int) -> None:
    model, norms = Separable(), []
    alone = PlainEngine(CPU, torch.float32, 0.5)
    alone.setup(model, adamw(ADAM), schedule(ADAM, 10))
    for _ in range(3):
        alone.backward(sum(model(1.0 + rank) for rank in range(count // 2)) / (count // 2))
        norms.append(alone.step())
    for rank, (found, masters, same) in enumerate(ranks(cut, kind, count=count)):
        assert found == pytest.approx(norms, rel=1e-5)
        assert same
        assert sorted(masters) == (["cut", "whole"] if rank == 0 else [])
        for name, master in masters.items():
            torch.testing.assert_close(master, alone.masters()[name], rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Saved:
    """What an engine holds, full and by name."""

    masters: dict[str, Tensor]
    moments: Moments
    steps: int


def went_on(
    kind: type[PlainEngine], dtype: torch.dtype, given: Saved | None, steps: int
) -> tuple[Saved, Saved, list[float]]:
    """What the main rank holds after restoring, and some steps later; their rates and gradient norms."""
    engine, first = made(kind, dtype), 0
    if given is not None:
        engine.restore(given.masters, given.moments, given.steps)
        first = given.steps
    before, seen = saved(engine, first), []
    for step in range(first, first + steps):
        seen.append(engine.learning_rate())
        mine = range(engine.data_rank, 2, engine.data_size)
        for number in mine:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2 * step + number)).to(dtype)
            with engine.accumulate(last=number == mine[-1]):
                engine.backward(engine.model(x, both=step > 1).float().square().mean() / len(mine))
        seen.append(engine.step())
    after = saved(engine, first + steps)
    engine.close()
    return before, after, seen


def saved(engine: PlainEngine, steps: int) -> Saved:
    live = engine.moments()
    moments = Moments(engine.gather(live.mean), engine.gather(live.square), dict(live.updates))
    return Saved(engine.gather(engine.masters()), moments, steps)


def same(one: Saved, other: Saved) -> None:
    """Assert equality bit for bit."""
    assert (one.steps, one.moments.updates) == (other.steps, other.moments.updates)
    pairs = [(each.masters, each.moments.mean, each.moments.square) for each in (one, other)]
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_one_layout_saved_another_goes_on_with(ranks: Ranks, dtype: torch.dtype) -> None:
    """One process, two replicas, two shards, one process again: bit for bit handed over, and the same training."""
    _, given, _ = went_on(PlainEngine, dtype, None, 3)
    _, _, straight = went_on(PlainEngine, dtype, given, 3)
    came = []
    for kind, count in ((PlainEngine, 2), (FsdpEngine, 2), (PlainEngine, 1)):
        run = (kind, dtype, given, 1)
        before, after, seen = ranks(went_on, *run)[0] if count == 2 else went_on(*run)
        same(before, given)
        came.extend(seen)
        given = after
    assert given.steps == 6
    assert came == pytest.approx(straight, rel=1e-5 if dtype == torch.float32 else 3e-2)


@torch.no_grad()
def published(kind: type[PlainEngine], dtype: torch.dtype) -> bool:
    """Whether the network computes with masters that were written to after it was looked at."""
    engine, x = made(kind, dtype), torch.ones(1, 3).to(dtype)
    before = engine.model(x, both=True).clone()
    full = engine.gather(engine.masters(), spread=True)
    for master in engine.masters().values():
        master.mul_(0.5)
    engine.publish()
    reference = Forked()
    halves = {name: tensor for part in engine.collect(full) for name, tensor in part.items()}
    reference.load_state_dict({name: 0.5 * tensor for name, tensor in halves.items()})
    same = torch.equal(engine.model(x, both=True), reference.to(dtype)(x, both=True))
    engine.close()
    return same and not torch.equal(before, reference(x, both=True))


@pytest.mark.parametrize("kind", [PlainEngine, FsdpEngine])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_to_masters_is_computed_with(ranks: Ranks, kind: type[PlainEngine], dtype: torch.dtype) -> None:
    assert ranks(published, kind, dtype) == [True, True]


def poisoned(kind: type[PlainEngine], dtype: torch.dtype) -> tuple[bool, list[float]]:
    """A step in which rank 1 has a NaN, then a good one: whether the first kept everything, norms and rates."""
    engine = made(kind, dtype)
    before = {name: master.clone() for name, master in engine.masters().items()}
    kept, seen = True, []
    for factor in (float("nan") if engine.rank == 1 else 1.0, 1.0):
        with engine.accumulate(last=True):
            engine.backward(engine.model(torch.ones(1, 3).to(dtype), both=True).float().mean() * factor)
        seen.extend([engine.step(), engine.learning_rate()])
        if len(seen) == 2:
            kept = all(torch.equal(master, before[name]) for name, master in engine.masters().items())
            kept = kept and not engine.moments().updates
    engine.close()
    return kept, seen


@pytest.mark.parametrize("kind", [PlainEngine, FsdpEngine])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_on_one_rank_updates_none(ranks: Ranks, kind: type[PlainEngine], dtype: torch.dtype) -> None:
    found = ranks(poisoned, kind, dtype)
    for kept, (bad, rate, good, following) in found:
        assert kept
        assert not math.isfinite(bad)
        assert math.isfinite(good)
        assert (rate, following) == pytest.approx((5e-3, 7.5e-3))
    assert found[0][1][2] == found[1][1][2]


class Watched(nn.Linear):
    """Says what it computes with."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, t: Tensor) -> tuple[Tensor, list[Any]]:
        seen = [t.dtype, self.weight.dtype, self.get_buffer("scale").dtype, isinstance(self.weight, DTensor)]
        return nn.functional.linear(t.to(self.weight.dtype), self.weight, self.bias) * self.scale, seen


def precision() -> list[Any]:
    engine = FsdpEngine(CPU, torch.bfloat16, 1.0, World.join(section(), CPU))
    engine.setup(Watched(), adamw(ADAM), schedule(ADAM, 10))
    output, seen = engine.model(torch.ones(2, 3))
    engine.close()
    return [*seen, output.dtype]


def test_bf16_is_what_the_weights_are_gathered_in(ranks: Ranks) -> None:
    """Times stay fp32, buffers are bf16."""
    half = torch.bfloat16
    assert ranks(precision) == [[torch.float32, half, half, False, half]] * 2


def test_leaves_are_the_weights_that_a_loss_depends_on() -> None:
    model = Forked()
    names = {id(weight): name for name, weight in model.named_parameters()}
    one, both = (leaves(model(torch.ones(1, 3), both).sum()) for both in (False, True))
    assert {names[i] for i in both - one} == {"sometimes.weight", "sometimes.bias"}
    assert not [i for i in both if "never" in names[i]]
    assert leaves(torch.ones(())) == set()
