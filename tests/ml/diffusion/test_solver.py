"""Euler along the exact velocity ends at the data."""

import pytest
import torch
from torch import Tensor

from ml.diffusion import rectified_flow, timesteps
from ml.diffusion.solver import noise, solve


@pytest.mark.parametrize(("steps", "by"), [(1, 1.0), (7, 3.0), (50, 11.87)])
def test_the_exact_velocity_recovers_the_data(steps: int, by: float) -> None:
    """Straight paths: any grid ends at x0 + sigma x1."""
    data, start = (torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    velocity = rectified_flow.target(data, start, 1e-5)
    found = solve(lambda x, t, index: velocity, start, timesteps.grid(steps, by))
    assert torch.allclose(found, data + 1e-5 * start, atol=1e-12)


def test_euler_of_a_linear_velocity_has_its_closed_form() -> None:
    """dx/dt = x from t = 1 to 0 in n even steps is x (1 - 1/n)^n."""
    found = solve(lambda x, t, index: x, torch.ones(1, 1, 1, 1, 1).double(), timesteps.grid(10, 1.0))
    assert found.item() == pytest.approx(0.9**10)


def test_the_velocity_is_asked_at_every_time_but_the_last() -> None:
    asked: list[tuple[float, int]] = []
    done: list[int] = []

    def velocity(x: Tensor, t: float, index: int) -> Tensor:
        asked.append((t, index))
        return torch.zeros_like(x)

    grid = timesteps.grid(4, 2.0)
    solve(velocity, torch.zeros(1, 1, 1, 1, 1), grid, done.append)
    assert asked == [(t, i) for i, t in enumerate(grid.tolist()[:-1])]
    assert done == [1, 2, 3, 4]


def test_noise_belongs_to_its_seed_not_to_its_batch() -> None:
    together, alone = noise((16, 3, 2, 2), [7, 8]), noise((16, 3, 2, 2), [8])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.std().item() == pytest.approx(1.0, abs=0.1)
