"""What is measured is the house's own step: its tokens, its FLOPs, its loss."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.real_step import Case, Measured, RealStep, accelerator, here, measure, section_of, stir
from ml.counts import block_flops
from ml.recipe import Recipe


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(Recipe.load("v2_0", "tiny"), "64px", 5, batch=2, blocks=(1, 1), heads=2)


def test_a_slice_keeps_everything_but_depth_and_width() -> None:
    whole = Recipe.load("v2_0", "paper")
    slice_ = Case(whole, "256px", 129, blocks=(2, 4))
    assert (slice_.tokens, slice_.network.hidden_size) == (8448, 3072)
    assert slice_.scale == pytest.approx(57 / 6, rel=1e-3)
    assert Case(whole, "256px", 129).scale == 1
    assert Case(whole, "256px", 129, heads=2).network.hidden_size == 256
    assert Case(Recipe.load("v1_2", "paper"), "256", 51, blocks=(3, 0)).scale == pytest.approx(28 / 3)


def test_batches_are_drawn_by_their_place(case: Case) -> None:
    with case.stream() as one, case.stream() as two:
        first, data = one.next()
        assert torch.equal(data.latents, two.next()[1].latents)
        assert data.latents.shape == (2, 16, *case.grid)
        assert not torch.equal(data.latents, one.next()[1].latents)
        assert len(first.ids) == 2


def test_a_step_trains_the_slice_and_counts_its_work(case: Case) -> None:
    with RealStep(case, section_of({})) as step:
        before = {name: tensor.clone() for name, tensor in step.engine.masters().items()}
        report = step()
        changed = [name for name, tensor in step.engine.masters().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > 0.9 * len(before)
    assert report.updated
    assert report.tokens == 2 * case.tokens
    assert report.flops == 2 * 3 * block_flops(case.network, case.grid, case.recipe.text.max_tokens)


def test_levers_change_the_speed_and_not_the_losses(case: Case) -> None:
    plain = measure(case, section_of({}), steps=2, warm_up=1)
    selective = measure(case, section_of({"checkpoint_blocks": (9, 9), "recompute": "selective"}), 2, 1)
    formula = measure(case, section_of({}), 2, 1, SDPBackend.MATH)
    assert plain.losses == selective.losses
    assert formula.losses == pytest.approx(plain.losses, rel=1e-5)
    assert plain.tokens == 2 * case.tokens
    assert plain.tokens_per_second == pytest.approx(plain.tokens / plain.seconds)
    assert 0 <= plain.waited < 1
    assert plain.peak_bytes > 2**26


def test_a_cpu_has_no_utilisation_to_speak_of() -> None:
    if torch.cuda.is_available():
        assert here().accelerators == f"{accelerator()}:1"
    else:
        assert accelerator() == "CPU"
        assert Measured(1.0, 1.0, 1.0, 1, 0.0, ()).utilisation is None
        assert here().on_cpu
        assert section_of({"grad_clip": 2.0}).precision == "fp32"


def test_nothing_is_left_at_zero() -> None:
    layer = torch.nn.Linear(3, 3)
    torch.nn.init.zeros_(layer.weight)
    bias = layer.bias.detach().clone()
    stir(layer)
    assert layer.weight.any()
    assert torch.equal(layer.bias, bias)
