"""Closed forms of denoising diffusion: posterior, respacing, variational bound, ancestral steps."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

from ml import processes
from ml.diffusion.iddpm import IDDPM, Normal, Schedule, log_likelihood

SECTION = processes.IDDPM()
SCHEDULE = Schedule.of(SECTION)


def _tensors(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).double() for _ in range(count)]


def test_betas_and_what_is_kept_at_the_ends() -> None:
    """Released schedule: 1e-4 to 0.02 over 1000 steps leaves 4.0e-5 of the signal's power."""
    assert SCHEDULE.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert SCHEDULE.kept[0].item() == pytest.approx(0.9999)
    logs = sum(math.log(1 - (1e-4 + (0.02 - 1e-4) * i / 999)) for i in range(1000))
    assert SCHEDULE.kept[-1].item() == pytest.approx(math.exp(logs))
    assert SCHEDULE.kept[-1].item() == pytest.approx(4.04e-5, rel=1e-2)


@pytest.mark.parametrize("index", [1, 10, 500, 999])
def test_the_posterior_is_bayes_rule(index: int) -> None:
    """Prior N(sqrt(a') x0, 1 - a') times likelihood N(x_i; sqrt(1 - b) x, b): precisions add."""
    data, x = _tensors(2, 1, 2, 1, 2, 2)
    beta, before = SCHEDULE.betas[index].item(), SCHEDULE.kept[index - 1].item()
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * data / (1 - before) + math.sqrt(1 - beta) * x / beta) / precision
    found = SCHEDULE.before(data, x, torch.tensor([index]))
    assert torch.allclose(found.mean, mean, atol=1e-10)
    assert found.log_variance.flatten()[0].item() == pytest.approx(-math.log(precision))


def test_the_first_log_variance_is_the_second_steps() -> None:
    assert SCHEDULE.posterior[0] == 0
    assert SCHEDULE.log_posterior[0] == SCHEDULE.log_posterior[1]


def test_noise_and_data_invert_each_other() -> None:
    data, noise = _tensors(2, 3, 2, 1, 2, 2)
    index = torch.tensor([0, 400, 999])
    assert torch.allclose(SCHEDULE.data(SCHEDULE.noisy(data, noise, index), noise, index), data, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 20, 100, 1000])
def test_respacing_keeps_the_noise_of_the_steps_it_takes(count: int) -> None:
    spaced = SCHEDULE.respaced(count)
    assert len(spaced) == count
    assert torch.allclose(spaced.kept, SCHEDULE.kept[spaced.steps])
    assert spaced.steps[0] == 0
    assert count == 1 or spaced.steps[-1] == 999


def test_a_hundred_released_steps() -> None:
    """space_timesteps(1000, "100"): stride 999 / 99."""
    steps = SCHEDULE.respaced(100).steps.tolist()
    assert steps[:5] == [0, 10, 20, 30, 40]
    assert steps[10:13] == [101, 111, 121]
    with pytest.raises(ValueError, match="1001 sampling steps"):
        SCHEDULE.respaced(1001)


def test_the_learned_variance_runs_from_the_posterior_to_beta() -> None:
    noise, x = _tensors(2, 1, 1, 1, 1, 3)
    share = torch.tensor([-1.0, 0.0, 1.0]).double().reshape(1, 1, 1, 1, 3)
    found = SCHEDULE.predicted(torch.cat([noise, share], 1), x, torch.tensor([300]))
    low, high = SCHEDULE.log_posterior[300].item(), math.log(SCHEDULE.betas[300].item())
    assert found.log_variance.flatten().tolist() == pytest.approx([low, (low + high) / 2, high])
    fixed = Schedule.of(processes.IDDPM(learn_sigma=False)).predicted(noise, x, torch.tensor([300]))
    assert fixed.log_variance.flatten().tolist() == pytest.approx([high] * 3)


def test_the_loss_is_the_squared_error_and_the_divergence_in_bits() -> None:
    process = IDDPM(SECTION)
    data, noise, guess, share = _tensors(4, 1, 2, 3, 2, 2)
    index = torch.tensor([250])
    x = SCHEDULE.noisy(data, noise, index)
    wanted, found = SCHEDULE.before(data, x, index), SCHEDULE.predicted(torch.cat([guess, share], 1), x, index)
    p, q = (TorchNormal(n.mean, torch.exp(n.log_variance / 2)) for n in (wanted, found))
    expected = (guess - noise).square().mean() + kl_divergence(p, q).mean() / math.log(2)
    loss = process.losses(torch.cat([guess, share], 1), data, noise, index)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert process.errors(torch.cat([guess, share], 1), data, noise, index).item() == pytest.approx(
        (guess - noise).square().mean().item(), rel=1e-5
    )


def test_the_bound_at_step_zero_is_the_likelihood_of_a_bin() -> None:
    """With a narrow prediction at the data, the bin 2/255 wide holds nearly everything; the outer bins are open."""
    at = torch.tensor([-1.0, 0.3, 1.0])
    narrow = log_likelihood(at, Normal(at, torch.full((3,), 2 * math.log(1e-4))))
    assert narrow.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    wide = log_likelihood(torch.tensor([0.2]), Normal(torch.tensor([0.0]), torch.zeros(1)))
    normal = TorchNormal(0.0, 1.0)
    exact = (normal.cdf(torch.tensor(0.2 + 1 / 255)) - normal.cdf(torch.tensor(0.2 - 1 / 255))).log()
    assert wide.item() == pytest.approx(exact.item(), abs=2e-3)
    data, noise, guess, share = (part.float() for part in _tensors(4, 1, 2, 1, 2, 2))
    process, index = IDDPM(SECTION), torch.tensor([0])
    output = torch.cat([guess, share], 1)
    found = SCHEDULE.predicted(output, SCHEDULE.noisy(data, noise, index), index)
    bits = -log_likelihood(data, found).mean() / math.log(2)
    assert process.losses(output, data, noise, index).item() == pytest.approx(
        (bits + (guess - noise).square().mean()).item(), rel=1e-4
    )


def test_the_bound_teaches_the_variance_and_not_the_noise() -> None:
    data, noise, guess, share = (part.float() for part in _tensors(4, 1, 2, 1, 2, 2))
    output = torch.cat([guess, share], 1).requires_grad_()
    IDDPM(SECTION).losses(output, data, noise, torch.tensor([250])).sum().backward()
    assert output.grad is not None
    assert torch.allclose(output.grad[:, :2], 2 * (guess - noise) / guess.numel(), atol=1e-6)
    assert output.grad[:, 2:].abs().max() > 0


def test_inactive_frames_are_taken_at_step_zero_and_do_not_count() -> None:
    process = IDDPM(SECTION)
    data, noise, guess, share = _tensors(4, 2, 2, 3, 2, 2)
    active = torch.tensor([[True, False, True], [True, True, True]])
    times = torch.tensor([600, 600])
    noisy = process.noisy(data, noise, times, active)
    least = math.sqrt(0.9999) * data + math.sqrt(1e-4) * noise
    assert torch.allclose(noisy[0, :, 1], least[0, :, 1], atol=1e-6)
    assert torch.equal(noisy[1], SCHEDULE.noisy(data, noise, times)[1])
    output = torch.cat([guess, share], 1)
    before = process.losses(output, data, noise, times, active.float())
    changed = output.clone()
    changed[0, :, 1] += 7
    assert torch.equal(process.losses(changed, data, noise, times, active.float()), before)
    assert not torch.equal(process.losses(changed, data, noise, times), process.losses(output, data, noise, times))


@pytest.mark.parametrize("count", [5, 100])
def test_ancestral_steps_with_the_exact_noise_end_at_the_data(count: int) -> None:
    """For data that is one point, the noise in any x is known, and the last step returns the point itself."""
    point, x = _tensors(2, 2, 3, 2, 2, 2)
    schedule, generator = SCHEDULE.respaced(count), torch.Generator().manual_seed(1)
    for index in reversed(range(count)):
        kept = schedule.kept[index]
        noise = (x - kept.sqrt() * point) / (1 - kept).sqrt()
        fresh = torch.randn(x.shape, generator=generator).double()
        x = schedule.step(torch.cat([noise, torch.zeros_like(noise)], 1), x, index, fresh)
    assert torch.allclose(x, point, atol=1e-9)


def test_steps_are_drawn_evenly_and_fractions_fall_into_them() -> None:
    process = IDDPM(SECTION)
    shape = None
    drawn = process.draw(50_000, shape, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert drawn.min() == 0
    assert drawn.max() == 999
    assert drawn.double().mean().item() == pytest.approx(499.5, abs=5)
    assert [process.at(f, 1).item() for f in (0.0, 0.25, 0.9999, 1.0)] == [0, 250, 999, 999]
    assert process.network_time(process.at(0.25, 2)).tolist() == [250.0, 250.0]
