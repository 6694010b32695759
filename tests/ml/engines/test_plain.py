from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml.engines.plain import PlainEngine, device_of, make_engine
from ml.engines.protocol import EngineError
from ml.sections import Adam, Compute, Engine
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-8, betas=(0.9, 0.999), weight_decay=0.01, warmup_steps=3)
SECTION = {"kind": "plain", "precision": "fp32", "grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1}
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


def compute(accelerators: str, nodes: int = 1) -> Compute:
    return Compute(accelerators=accelerators, nodes=nodes, price="cpu-assume-2026")


def section(**over: Any) -> Engine:
    return Engine(**{**SECTION, "checkpoint_blocks": (0, 0), **over})


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
def test_saving_and_loading_goes_on_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    straight = engine(dtype)
    train(straight, range(7))
    first = engine(dtype)
    train(first, range(4))
    first.save(tmp_path)
    second = PlainEngine(CPU, dtype, 1.0)
    second.setup(network(seed=9), adamw(ADAM), schedule(ADAM, 10))
    second.load(tmp_path)
    assert second.learning_rate() == first.learning_rate()
    train(second, range(4, 7))
    for name, weight in straight.masters().items():
        assert torch.equal(weight, second.masters()[name])
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    engine().save(tmp_path)
    other = PlainEngine(CPU, torch.float32, 1.0)
    other.setup(nn.Sequential(nn.Linear(6, 13), nn.GELU(), nn.Linear(13, 2)), adamw(ADAM), schedule(ADAM, 10))
    with pytest.raises(EngineError, match=r"holds 0.bias as \(12,\), the model has \(13,\)"):
        other.load(tmp_path)


def test_gathered_tensors_are_copies() -> None:
    made = engine()
    copy = made.gather(made.masters())
    train(made, range(1))
    assert not torch.equal(copy["0.weight"], made.masters()["0.weight"])
    assert made.scatter(copy)["0.weight"] is not copy["0.weight"]
    assert made.mean(3.5) == 3.5


@pytest.mark.parametrize(
    ("asked", "hardware", "why"),
    [
        ({"sequence_parallel": 4}, "CPU:2", "sequence_parallel is 4: set it to 1"),
        ({}, "H200:8", "drives one GPU, compute asks for H200:8"),
    ],
)
def test_what_one_device_cannot_do_is_refused(asked: dict[str, Any], hardware: str, why: str) -> None:
    with pytest.raises(EngineError, match=why):
        make_engine(section(**asked), compute(hardware))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="drives one process, 2 were started"):
        make_engine(section(), compute("CPU:1"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_named() -> None:
    with pytest.raises(EngineError, match="asks for H100:1, and torch sees no CUDA device"):
        make_engine(section(), compute("H100:1"))


def test_a_cpu_engine_takes_the_cores_and_the_precision_it_is_given() -> None:
    before = torch.get_num_threads()
    try:
        made = make_engine(section(precision="bf16"), compute("CPU:3"))
        assert torch.get_num_threads() == 3
        assert device_of(compute("CPU:1")) == CPU
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert (made.device, made.dtype, made.data_size) == (CPU, torch.bfloat16, 1)
    made.barrier()
    made.close()
