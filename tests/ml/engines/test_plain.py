import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ml.engines.plain import PlainEngine, share_out
from ml.engines.protocol import EngineError, Moments
from ml.sections import Adam
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01, warmup_steps=3)
CPU = torch.device("cpu")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 2))


def engine(dtype: torch.dtype = torch.float32, clip: float = 1.0, adam: Adam = ADAM) -> PlainEngine:
    made = PlainEngine(CPU, dtype, clip)
    made.setup(network(), adamw(adam), schedule(adam, 10))
    return made


def batch(step: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def train(made: PlainEngine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        made.backward(made.model(batch(step).to(made.dtype)).float().square().mean() * 10)
        norms.append(made.step())
    return norms


def saved(made: PlainEngine) -> tuple[dict[str, torch.Tensor], Moments]:
    """Copies of all that `restore` takes back."""
    moments = made.moments()
    return made.gather(made.masters()), Moments(
        made.gather(moments.mean), made.gather(moments.square), dict(moments.updates)
    )


def test_fp32_is_plain_torch_with_clipping_and_warm_up() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01)
    norms = []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 4)
        (model(batch(step)).square().mean() * 10).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    made = engine(clip=0.5)
    assert train(made, range(6)) == pytest.approx(norms, rel=1e-5)
    for ours, theirs in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_is_that_of_the_next_step() -> None:
    made, rates = engine(), []
    for step in range(5):
        rates.append(made.learning_rate())
        train(made, range(step, step + 1))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_bf16_adds_up_updates_that_bf16_alone_would_lose() -> None:
    """One step of 1e-5 on weights near 0.3 is below bf16's spacing (2e-3); a thousand of them are 1e-2."""
    small = ADAM.model_copy(update={"lr": 1e-5, "weight_decay": 0.0, "warmup_steps": 0})
    made = engine(torch.bfloat16, adam=small)
    before = {name: weight.clone() for name, weight in made.masters().items()}
    made.model[0].bias.data.fill_(0.3)
    made.masters()["0.bias"].fill_(0.3)
    for _ in range(1000):
        made.backward(made.model[0].bias.float().sum())
        made.step()
    assert made.model[0].bias.dtype == torch.bfloat16
    assert made.masters()["0.bias"].dtype == torch.float32
    assert float(made.masters()["0.bias"][0]) == pytest.approx(0.29, abs=2e-4)
    assert float(made.model[0].bias[0].detach()) == pytest.approx(0.29, abs=2e-3)
    assert torch.equal(made.masters()["2.weight"], before["2.weight"])


def test_bf16_gradients_of_micro_batches_are_added_in_fp32() -> None:
    made = engine(torch.bfloat16)
    for _ in range(1024):
        made.backward(made.model[0].bias.sum() / 1024)
    assert torch.equal(dict(made._masters)["0.bias"].grad, torch.ones(12))


def test_bf16_starts_as_the_rounded_fp32_network() -> None:
    full, half = engine(), engine(torch.bfloat16)
    for name, weight in half.masters().items():
        assert torch.equal(weight, full.masters()[name])
        assert torch.equal(dict(half.model.named_parameters())[name], weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_goes_on_exactly(dtype: torch.dtype) -> None:
    straight, first, second = engine(dtype), engine(dtype), PlainEngine(CPU, dtype, 1.0)
    second.setup(network(seed=9), adamw(ADAM), schedule(ADAM, 10))
    train(straight, range(7))
    train(first, range(4))
    second.restore(*saved(first), steps=4)
    assert second.learning_rate() == first.learning_rate()
    train(second, range(4, 7))
    for name, weight in straight.masters().items():
        assert torch.equal(weight, second.masters()[name])
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True))
    assert dict(second.moments().updates) == dict.fromkeys(straight.masters(), 7)


@pytest.mark.parametrize("adam", [ADAM, ADAM.model_copy(update={"schedule": "cosine"})])
def test_the_rate_of_a_restored_schedule_is_that_of_an_uninterrupted_one(adam: Adam) -> None:
    straight, rates = engine(adam=adam), []
    for step in range(9):
        rates.append(straight.learning_rate())
        train(straight, range(step, step + 1))
    for steps in (0, 1, 5, 8):
        # Rolled back: the engine has been further.
        made = engine(adam=adam)
        train(made, range(7))
        made.restore(*saved(engine(adam=adam)), steps=steps)
        found = []
        for step in range(steps, 9):
            found.append(made.learning_rate())
            train(made, range(step, step + 1))
        assert found == rates[steps:]


def test_a_restored_weight_that_never_had_a_gradient_has_no_moments() -> None:
    first, second = engine(), engine()
    first.backward(first.model[2](torch.ones(1, 12)).sum())
    first.step()
    assert sorted(first.moments().mean) == ["2.bias", "2.weight"]
    train(second, range(2))
    second.restore(*saved(first), steps=1)
    assert dict(second.moments().updates) == {"2.weight": 1, "2.bias": 1}
    assert torch.equal(second.moments().square["2.bias"], first.moments().square["2.bias"])


def test_an_optimizer_without_moments_has_none() -> None:
    made = PlainEngine(CPU, torch.float32, 1.0)
    made.setup(network(), lambda weights: torch.optim.SGD(weights, lr=0.1), lambda o: LambdaLR(o, lambda _: 1.0))
    train(made, range(2))
    assert made.moments().updates == {}


class OneByOne(Mapping[str, torch.Tensor]):
    """Tensors that are read when they are asked for; says how many were read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.read = tensors, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_every_saved_tensor_is_read_once() -> None:
    first, second = engine(), engine()
    train(first, range(2))
    masters, moments = saved(first)
    given = [OneByOne(dict(tensors)) for tensors in (masters, moments.mean, moments.square)]
    second.restore(given[0], Moments(given[1], given[2], moments.updates), 2)
    scattered = second.scatter(given[0])
    assert [each.read for each in given] == [8, 4, 4]
    assert all(torch.equal(scattered[name], first.masters()[name]) for name in masters)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (nn.Linear(6, 13), r"they hold 0.weight as \(12, 6\), the model has \(13, 6\)"),
        (nn.Linear(6, 12, bias=False), r"they hold 0.bias as \(12,\), the model has None"),
    ],
)
def test_weights_of_another_network_are_refused(other: nn.Linear, why: str) -> None:
    made = PlainEngine(CPU, torch.float32, 1.0)
    made.setup(nn.Sequential(other, nn.GELU(), nn.Linear(other.out_features, 2)), adamw(ADAM), schedule(ADAM, 10))
    with pytest.raises(EngineError, match=why):
        made.restore(*saved(engine()), steps=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_updates_nothing(dtype: torch.dtype) -> None:
    """From the very first step on, when torch's schedules take a step without an update for a mistake."""
    made, rates = engine(dtype), []
    before = made.gather(made.masters())
    for factor in (float("nan"), float("inf")):
        made.backward(made.model(batch(0).to(dtype)).float().square().mean() * factor)
        assert not math.isfinite(made.step())
        rates.append(made.learning_rate())
    made.backward(made.model(batch(0).to(dtype)).float().square().mean())
    made.discard()
    rates.append(made.learning_rate())
    assert rates == pytest.approx([0.005, 0.0075, 0.01])
    assert all(torch.equal(weight, before[name]) for name, weight in made.masters().items())
    assert made.moments().updates == {}
    assert math.isfinite(train(made, range(1))[0])


def test_gathered_tensors_are_copies() -> None:
    made = engine()
    copy = made.gather(made.masters())
    train(made, range(1))
    assert not torch.equal(copy["0.weight"], made.masters()["0.weight"])
    assert made.scatter(copy)["0.weight"] is not copy["0.weight"]
    assert (made.total([3.5]), made.collect({"a": 1})) == ([3.5], [{"a": 1}])
    assert made.gather(made.masters(), spread=True).keys() == copy.keys()


def test_shares_are_about_equal() -> None:
    sizes = {"a": 5, "b": 1, "c": 4, "d": 4, "e": 2}
    keepers = share_out(sizes, 3)
    assert sorted(keepers) == sorted(sizes)
    loads = [sum(size for name, size in sizes.items() if keepers[name] == rank) for rank in range(3)]
    assert max(loads) <= sum(sizes.values()) / 3 + max(sizes.values())
    assert set(share_out(sizes, 1).values()) == {0}
