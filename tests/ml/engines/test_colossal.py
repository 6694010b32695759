"""ColossalAI's engine: the steps of one process, exact resume to and from the plain engine, and what goes wrong."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.engines.colossal import make_colossal
from ml.engines.make import make_engine
from ml.engines.protocol import Engine, EngineError, Moments
from ml.engines.world import World
from ml.methods import Engine as EngineSection
from ml.sections import Adam, Compute
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-6, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=3)
SECTION = {"grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1, "checkpoint_blocks": (0, 0)}
CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"kind": "plain"}
# What a section says, and how many ranks.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "ddp": ({"sharding": "none", "accumulate": 2}, 2),
    "zero1": ({"sharding": "zero1", "accumulate": 2}, 2),
    "zero2": ({"sharding": "zero2", "accumulate": 2}, 2),
    "zero2, sequence": ({"sharding": "zero2", "accumulate": 4, "sequence_parallel": 2}, 2),
    "zero2, tensor": ({"sharding": "zero2", "accumulate": 4, "tensor_parallel": 2}, 2),
    "pipeline": ({"sharding": "none", "accumulate": 4, "pipeline_parallel": 2}, 2),
    "data, pipeline": ({"sharding": "none", "accumulate": 2, "pipeline_parallel": 2}, 4),
    "zero1, pipeline": ({"sharding": "zero1", "accumulate": 2, "pipeline_parallel": 2}, 4),
    "zero2, pipeline": ({"sharding": "zero2", "accumulate": 2, "pipeline_parallel": 2}, 4),
}

Curves = Callable[..., Any]
Ranks = Callable[..., list[Any]]


@pytest.mark.parametrize("network", ["mmdit", "stdit3"])
def test_zero2_takes_the_twenty_steps_of_one_process(curves: Curves, network: str) -> None:
    section, count = WAYS["zero2"]
    curves(network, {"kind": "colossal", **section}, count).agrees(curves(network, {}))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "zero2"])
def test_ranks_take_the_steps_of_one_process(curves: Curves, way: str) -> None:
    section, count = WAYS[way]
    curves("mmdit", {"kind": "colossal", **section}, count, few=True).agrees(curves("mmdit", {}, few=True))


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2"])
def test_one_process_takes_the_steps_of_the_plain_engine(curves: Curves, sharding: str) -> None:
    one = curves("mmdit", {"kind": "colossal", "sharding": sharding}, few=True)
    one.agrees(curves("mmdit", {}, few=True), rel=1e-5)


def test_bf16_stays_as_near_to_one_process_as_rounding_lets_it(curves: Curves) -> None:
    """bf16 has 8 bits: ranks that add up gradients in another order round them by 2^-8 of each at most."""
    one = curves("mmdit", {"precision": "bf16"}, few=True)
    two = curves("mmdit", {"kind": "colossal", "precision": "bf16", "sharding": "zero2", "accumulate": 2}, 2, few=True)
    assert two.losses == pytest.approx(one.losses, rel=2**-8)
    assert two.norms == pytest.approx(one.norms, rel=2**-4)


class Small(nn.Module):
    """Sizes that two ranks do not divide, a weight smaller than the ranks, and a layer that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.silent = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) * self.scale
        return out


def new_engine(over: dict[str, Any], count: int) -> Engine:
    section = EngineSection.model_validate({**SECTION, "precision": "fp32", **over})
    engine = make_engine(section, Compute(accelerators="CPU:1", nodes=1, price="x", processes=count))
    engine.setup(Small(), adamw(ADAM), schedule(ADAM, 10))
    return engine


def train(engine: Engine, steps: range, spoiled: int | None = None) -> list[tuple[float, float]]:
    """Loss and norm of every step, two batches a step; in step `spoiled` one batch is not finite."""
    rows = []
    for step in steps:
        numbers = range(2 * step + engine.data_rank, 2 * step + 2, engine.data_size)
        losses = []
        for number in numbers:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
            if step == spoiled and number % 2:
                x[0, 0] = torch.nan
            with engine.accumulate(last=number == numbers[-1]):
                loss = engine.model(x.to(engine.dtype)).float().square().mean() * 10
                engine.backward(loss / len(numbers))
            losses.append(float(loss.detach()))
        rows.append((engine.total([sum(losses)])[0] / 2, engine.step()))
    return rows


def everything(engine: Engine) -> tuple[dict[str, Tensor], Moments]:
    moments = engine.moments()
    mean, square = engine.gather(moments.mean), engine.gather(moments.square)
    return engine.gather(engine.masters()), Moments(mean, square, moments.updates)


def through(over: dict[str, Any], count: int, steps: range, start: Any = None) -> tuple[Any, Any]:
    """Train from a saved state, or afresh; what happened, and the state at the end."""
    engine = new_engine(over, count)
    if start is not None:
        engine.restore(start[0], start[1], steps.start)
    found = train(engine, steps), everything(engine)
    engine.close()
    return found


def saved_and_resumed(over: dict[str, Any]) -> tuple[Any, Any]:
    """Six steps by one engine, and the last three once more by another that takes up its state after three."""
    engine = new_engine(over, 2)
    train(engine, range(3))
    middle = engine.collect(everything(engine))[0]
    straight = train(engine, range(3, 6)), everything(engine)
    other = new_engine(over, 2)
    other.restore(middle[0], middle[1], 3)
    resumed = train(other, range(3, 6)), everything(other)
    return straight, resumed


def alike(ours: Any, theirs: Any) -> None:
    """Assert that two saved states are the same to the bit."""
    assert ours[1].updates == theirs[1].updates
    for mine, other in ((ours[0], theirs[0]), (ours[1].mean, theirs[1].mean), (ours[1].square, theirs[1].square)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2"])
def test_what_is_saved_goes_on_to_the_bit(ranks: Ranks, sharding: str, precision: str) -> None:
    over = {"kind": "colossal", "sharding": sharding, "precision": precision}
    (rows, end), (again, resumed) = ranks(saved_and_resumed, over)[0]
    assert len(rows) == 3
    assert again == rows
    alike(resumed, end)
    assert end[1].updates == {name: 6 for name in end[0] if "silent" not in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plain_engine_and_this_one_take_up_what_the_other_left(ranks: Ranks, precision: str) -> None:
    """A state passes through the other engine unchanged, and its losses go on as they would have."""
    plain, zero = {**PLAIN, "precision": precision}, {"kind": "colossal", "sharding": "zero2", "precision": precision}
    near = 1e-5 if precision == "fp32" else 2e-2
    plain_rows, _ = through(plain, 1, range(6))
    _, left = through(plain, 1, range(3))
    zero_rows, taken = ranks(through, zero, 2, range(3, 6), left, count=2)[0]
    assert [row[0] for row in zero_rows] == pytest.approx([row[0] for row in plain_rows[3:]], rel=near)
    alike(ranks(through, zero, 2, range(3, 3), left, count=2)[0][1], left)
    alike(through(plain, 1, range(6, 6), taken)[1], taken)


def test_a_weight_without_a_gradient_keeps_its_value_and_has_no_moments(ranks: Ranks) -> None:
    for sharding in ("none", "zero1", "zero2"):
        over = {"kind": "colossal", "sharding": sharding}
        _, (masters, moments) = ranks(through, over, 2, range(2), count=2)[0]
        assert torch.equal(masters["silent.weight"], Small().state_dict()["silent.weight"])
        assert not torch.equal(masters["net.0.weight"], Small().state_dict()["net.0.weight"])
        silent = {"silent.weight", "silent.bias"}
        assert moments.updates == dict.fromkeys(masters.keys() - silent, 2)
        assert moments.mean.keys() == moments.square.keys() == masters.keys() - silent


def spoiled(over: dict[str, Any]) -> list[Any]:
    engine = new_engine(over, 2)
    rows, before, rate = train(engine, range(2)), everything(engine), engine.learning_rate()
    rows += train(engine, range(2, 3), spoiled=2)
    after, rates = everything(engine), (rate, engine.learning_rate())
    rows += train(engine, range(3, 4))
    return [rows, before, after, rates]


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2"])
def test_a_gradient_that_is_not_finite_on_one_rank_updates_nothing_on_any(ranks: Ranks, sharding: str) -> None:
    found = ranks(spoiled, {"kind": "colossal", "sharding": sharding}, count=2)
    for rows, _, _, rates in found:
        assert [torch.tensor(row[1]).isfinite().item() for row in rows] == [True, True, False, True]
        assert rates == pytest.approx((0.0075, 0.01))
    alike(found[0][1], found[0][2])


def test_a_first_step_that_is_not_finite_is_no_mistake_of_the_schedule() -> None:
    engine = new_engine({"kind": "colossal", "sharding": "zero2"}, 1)
    assert not torch.tensor(train(engine, range(1), spoiled=0)[0][1]).isfinite()
    assert engine.learning_rate() == pytest.approx(0.005)
    assert engine.moments().updates == {}
    engine.close()


def gathered(over: dict[str, Any]) -> Any:
    engine = new_engine(over, 2)
    full = engine.collect(engine.gather(engine.masters()))[0]
    shards = engine.scatter(full)
    live = engine.masters()
    same = all(torch.equal(shards[name], live[name]) and shards[name] is not live[name] for name in live)
    return (
        same,
        list(engine.gather(live)),
        list(engine.gather(live, spread=True)),
        sum(t.numel() for t in live.values()),
    )


def test_masters_are_pieces_that_gather_to_one_rank_or_spread_over_all(ranks: Ranks) -> None:
    first, second = ranks(gathered, {"kind": "colossal", "sharding": "zero1"}, count=2)
    names, numel = {n for n, _ in Small().named_parameters()}, sum(p.numel() for p in Small().parameters())
    assert first[0]
    assert second[0]
    assert set(first[1]) == names
    assert second[1] == []
    assert {*first[2], *second[2]} == names
    assert len(first[2]) + len(second[2]) == len(names)
    assert first[3] == second[3] <= numel / 2 + len(names)


def test_a_live_engine_goes_back_to_what_it_was() -> None:
    engine = new_engine({"kind": "colossal", "sharding": "zero2", "precision": "bf16"}, 1)
    train(engine, range(2))
    kept = everything(engine)
    rows = train(engine, range(2, 5))
    engine.backward(engine.model(torch.ones(1, 6, dtype=engine.dtype)).sum())
    engine.discard()
    engine.restore(kept[0], kept[1], 2)
    assert train(engine, range(2, 5)) == rows
    engine.close()


def test_an_engine_that_was_never_set_up_closes() -> None:
    section = EngineSection.model_validate({**SECTION, "precision": "fp32", "kind": "colossal"})
    make_engine(section, Compute(accelerators="CPU:1", nodes=1, price="x")).close()


def test_it_refuses_another_networks_weights() -> None:
    engine = new_engine({"kind": "colossal", "sharding": "zero1"}, 1)
    masters, moments = everything(engine)
    with pytest.raises(EngineError, match=r"net\.0\.bias"):
        engine.restore({n: t for n, t in masters.items() if n != "net.0.bias"}, moments, 0)
    engine.close()


def test_a_pipeline_goes_with_data_ranks_only_and_says_that_it_is_experimental(
    caplog: pytest.LogCaptureFixture,
) -> None:
    piped = {**SECTION, "precision": "fp32", "kind": "colossal", "pipeline_parallel": 2}
    for other in ("sequence_parallel", "tensor_parallel"):
        section = EngineSection.model_validate({**piped, other: 2})
        with pytest.raises(EngineError, match=rf"pipeline_parallel \(2\) .*{other} \(2\)"):
            make_colossal(section, CPU, World())
    assert not caplog.records
    make_colossal(EngineSection.model_validate(piped), CPU, World())
    make_colossal(EngineSection.model_validate(piped), CPU, World(rank=1, size=2))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["pipeline_parallel is experimental"]


def test_without_colossalai_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colossalai.accelerator", None)
    section = EngineSection.model_validate({**SECTION, "precision": "fp32", "kind": "colossal"})
    with pytest.raises(EngineError, match=r"pip install --no-deps colossalai==0\.5\.0"):
        make_colossal(section, CPU, World())
