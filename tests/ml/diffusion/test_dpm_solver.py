"""DPM-Solver++ against problems whose equation is solved in closed form."""

import pytest
import torch
from torch import Tensor

from ml.diffusion.dpm_solver import levels, solve
from ml.diffusion.iddpm import Schedule
from ml.processes import IDDPM

SCHEDULE = Schedule.of(IDDPM())


def _at(step: float) -> tuple[Tensor, Tensor]:
    """Shares of data and noise at a real training step: log alpha is linear between steps."""
    logs = SCHEDULE.kept.log() / 2
    low = min(int(step), 998)
    alpha = torch.exp(logs[low] + (step - low) * (logs[low + 1] - logs[low]))
    return alpha, (1 - alpha**2).sqrt()


def _gaussian_error(steps: int, mean: float = 0.7, spread: float = 0.5) -> float:
    """Largest error of a sample of N(mean, spread^2) data.

    There eps(x, t) = sigma (x - alpha m) / (alpha^2 s^2 + sigma^2), and along the exact solution (x - alpha m) /
    sqrt(alpha^2 s^2 + sigma^2) does not change.
    """

    def noise_of(x: Tensor, step: float, index: int) -> Tensor:
        alpha, sigma = _at(step)
        return sigma * (x - alpha * mean) / (alpha**2 * spread**2 + sigma**2)

    start = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    alpha, sigma = _at(999)
    moved = (start - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()
    alpha, sigma = _at(0)
    exact = alpha * mean + moved * (alpha**2 * spread**2 + sigma**2).sqrt()
    return (solve(noise_of, start, SCHEDULE, steps) - exact).abs().max().item()


def test_gaussian_data_is_solved_to_second_order() -> None:
    """Twice the steps, a quarter of the error."""
    coarse, fine, finer = (_gaussian_error(steps) for steps in (100, 200, 400))
    assert coarse / fine == pytest.approx(4.0, rel=0.3)
    assert fine / finer == pytest.approx(4.0, rel=0.3)
    assert finer < 0.01


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_data_that_is_one_point_is_solved_exactly(steps: int) -> None:
    """The predicted data is constant, so that every step is exact: x ends at alpha_0 point + sigma_0 eps."""
    point, noise = (torch.randn(3, 4, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    alpha, sigma = _at(999)
    start = alpha * point + sigma * noise
    found = solve(lambda x, step, index: (x - _at(step)[0] * point) / _at(step)[1], start, SCHEDULE, steps)
    alpha, sigma = _at(0)
    assert torch.allclose(found, alpha * point + sigma * noise, atol=1e-9)


def test_times_run_evenly_from_all_noise_to_the_first_step() -> None:
    visited = levels(SCHEDULE, 20)
    steps = [level.step for level in visited]
    assert len(steps) == 21
    assert steps[0] == pytest.approx(999.0)
    assert steps[-1] == pytest.approx(0.0, abs=1e-9)
    assert steps[10] == pytest.approx(499.5)
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1.0) for level in visited)
    assert visited[0].alpha ** 2 == pytest.approx(SCHEDULE.kept[-1].item())


def test_the_network_is_asked_once_a_step() -> None:
    asked: list[tuple[float, int]] = []
    done: list[int] = []

    def noise_of(x: Tensor, step: float, index: int) -> Tensor:
        asked.append((step, index))
        return x

    solve(noise_of, torch.ones(1, 1), SCHEDULE, 4, done.append)
    assert [index for _, index in asked] == [0, 1, 2, 3]
    assert [step for step, _ in asked] == pytest.approx([999.0, 749.25, 499.5, 249.75])
    assert done == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="2 steps at least"):
        solve(noise_of, torch.ones(1, 1), SCHEDULE, 1)
