"""The shift law, training draws and sampling grid."""

import math

import pytest
import torch

from ml.diffusion import timesteps
from ml.recipe import Recipe

OBJECTIVE = Recipe.load("v2_0", "paper").objective


@pytest.mark.parametrize("by", [0.5, 1.0, 3.0, 11.87])
def test_shift_keeps_both_ends_and_its_inverse_is_one_over_alpha(by: float) -> None:
    ends = timesteps.shift(torch.tensor([0.0, 1.0]).double(), by)
    assert ends.tolist() == [0.0, 1.0]
    t = torch.linspace(0, 1, 21).double()
    assert torch.allclose(timesteps.shift(timesteps.shift(t, by), 1 / by), t)
    assert timesteps.shift(torch.tensor(0.5).double(), by).item() == pytest.approx(by / (by + 1))


def test_alpha_of_the_worked_example() -> None:
    """768px 16:9, 129 frames: 2304 tokens a frame, 33 latent frames."""
    assert timesteps.alpha(OBJECTIVE.shift, 2304, 1) == pytest.approx(2.0667, abs=1e-4)
    assert timesteps.alpha(OBJECTIVE.shift, 2304, 33) == pytest.approx(11.872, abs=1e-3)
    assert timesteps.alpha(OBJECTIVE.shift, 256, 1) == 1.0
    assert timesteps.alpha(OBJECTIVE.shift, 4096, 1) == 3.0
    still = OBJECTIVE.shift.model_copy(update={"temporal": False})
    assert timesteps.alpha(still, 2304, 33) == timesteps.alpha(OBJECTIVE.shift, 2304, 1)


def test_draws_are_logit_normal_and_then_shifted() -> None:
    """The median of a logit-normal at mean 0 is 1/2, its quartiles sigmoid(+-0.6745); a shift maps quantiles."""
    drawn = timesteps.draw(OBJECTIVE, 40_000, 1.0, torch.Generator().manual_seed(0))
    quartiles = torch.quantile(drawn, torch.tensor([0.25, 0.5, 0.75]))
    expected = [1 / (1 + math.exp(-z)) for z in (-0.67449, 0.0, 0.67449)]
    assert quartiles.tolist() == pytest.approx(expected, abs=0.006)
    shifted = timesteps.draw(OBJECTIVE, 40_000, 3.0, torch.Generator().manual_seed(0))
    assert shifted.median().item() == pytest.approx(0.75, abs=0.006)
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_draws_repeat_with_their_seed() -> None:
    first, again, other = (timesteps.draw(OBJECTIVE, 8, 2.0, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_grid_falls_from_noise_to_data() -> None:
    grid = timesteps.grid(50, 11.87)
    assert grid.shape == (51,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert timesteps.grid(4, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert grid[25].item() == pytest.approx(11.87 / 12.87)
