"""The shift laws at values worked by hand, training draws and the sampling grid."""

import math
from dataclasses import replace

import pytest
import torch

from ml.diffusion import timesteps
from ml.diffusion.timesteps import Shape
from ml.processes import AreaShift, LinearShift, RectifiedFlow

# 768px 16:9 with 129 frames in 2.0; 720p 16:9 with 51 and 113 frames in 1.2 and 1.3.
WIDE = Shape(129, 576, 1024, 33, 2304)
OBJECTIVE = RectifiedFlow(law="v2_0", sigma_min=1e-5, shift=LinearShift(), drop_context=0.3)
STILL = Shape(1, 256, 256, 1, 256)


@pytest.mark.parametrize("by", [0.5, 1.0, 3.0, 11.87])
def test_shift_keeps_both_ends_and_its_inverse_is_one_over_alpha(by: float) -> None:
    ends = timesteps.shift(torch.tensor([0.0, 1.0]).double(), by)
    assert ends.tolist() == pytest.approx([0.0, 1.0])
    t = torch.linspace(0, 1, 21).double()
    assert torch.allclose(timesteps.shift(timesteps.shift(t, by), 1 / by), t)
    assert timesteps.shift(torch.tensor(0.5).double(), by).item() == pytest.approx(by / (by + 1))


def test_the_linear_law_of_the_worked_example() -> None:
    """768px 16:9, 129 frames: 2304 tokens a frame, 33 latent frames."""
    assert timesteps.shift_of(LinearShift(), replace(WIDE, latent_frames=1)) == pytest.approx(2.0667, abs=1e-4)
    assert timesteps.shift_of(LinearShift(), WIDE) == pytest.approx(11.872, abs=1e-3)
    assert timesteps.shift_of(LinearShift(), STILL) == 1.0
    assert timesteps.shift_of(LinearShift(), replace(STILL, tokens_per_frame=4096)) == 3.0
    assert timesteps.shift_of(LinearShift(temporal=False), WIDE) == pytest.approx(2.0667, abs=1e-4)


@pytest.mark.parametrize(
    ("law", "frames", "height", "width", "expected"),
    [
        ("v1_2", 51, 720, 1280, 7.2618),  # sqrt(921600 / 262144) = 1.875, floor(51 / 17) 5 = 15
        ("v1_2", 102, 720, 1280, 10.2698),  # 30 latents
        ("v1_2", 68, 144, 256, 1.6771),  # 0.375 sqrt(20)
        ("v1_2", 1, 512, 512, 1.0),
        ("v1_3", 113, 720, 1280, 9.9216),  # floor(112 / 4) = 28
        ("v1_3", 49, 360, 640, 3.2476),  # 0.9375 sqrt(12)
        ("v1_3", 1, 1024, 1024, 2.0),
    ],
)
def test_the_area_laws(law: str, frames: int, height: int, width: int, expected: float) -> None:
    shape = Shape(frames, height, width, 0, 0)
    assert timesteps.shift_of(AreaShift(law=law), shape) == pytest.approx(expected, abs=1e-4)  # type: ignore[arg-type]


def test_scale_and_temporal_of_the_area_laws() -> None:
    """1.3 scales clips only; a law that is not temporal counts one latent."""
    clip, still = Shape(49, 512, 512, 15, 0), Shape(1, 512, 512, 1, 0)
    assert timesteps.shift_of(AreaShift(law="v1_3", scale=2.0), clip) == pytest.approx(2 * math.sqrt(12))
    assert timesteps.shift_of(AreaShift(law="v1_3", scale=2.0), still) == 1.0
    assert timesteps.shift_of(AreaShift(law="v1_2", scale=2.0), still) == 2.0
    assert timesteps.shift_of(AreaShift(law="v1_2", temporal=False), clip) == 1.0


def test_draws_are_logit_normal_and_then_shifted() -> None:
    """The median of a logit-normal at mean 0 is 1/2, its quartiles sigmoid(+-0.6745); a shift maps quantiles."""
    drawn = timesteps.draw(OBJECTIVE, 40_000, STILL, torch.Generator().manual_seed(0))
    quartiles = torch.quantile(drawn, torch.tensor([0.25, 0.5, 0.75]))
    expected = [1 / (1 + math.exp(-z)) for z in (-0.67449, 0.0, 0.67449)]
    assert quartiles.tolist() == pytest.approx(expected, abs=0.006)
    large = replace(STILL, tokens_per_frame=4096)
    shifted = timesteps.draw(OBJECTIVE, 40_000, large, torch.Generator().manual_seed(0))
    assert shifted.median().item() == pytest.approx(0.75, abs=0.006)
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_times_above_a_threshold_are_drawn_evenly_for_clips() -> None:
    section = RectifiedFlow(law="v1_3", shift=AreaShift(law="v1_3"), drop_context=0.1, uniform_over=0.9)
    drawn = timesteps.draw(section, 40_000, Shape(49, 512, 512, 15, 0), torch.Generator().manual_seed(0))
    above = drawn[drawn > 0.9]
    assert above.mean().item() == pytest.approx(0.95, abs=0.002)
    assert above.std().item() == pytest.approx(0.1 / math.sqrt(12), abs=0.001)
    pictures = timesteps.draw(section, 40_000, Shape(1, 512, 512, 1, 0), torch.Generator().manual_seed(0))
    assert (pictures > 0.9).float().mean().item() == pytest.approx(0.014, abs=0.003)


def test_draws_repeat_with_their_seed() -> None:
    first, again, other = (timesteps.draw(OBJECTIVE, 8, WIDE, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("by", [1.0, 3.0, 7.2618, 11.87])
def test_the_grid_falls_from_exactly_noise_to_exactly_data(by: float) -> None:
    grid = timesteps.grid(50, by)
    assert grid.shape == (51,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert grid[25].item() == pytest.approx(by / (by + 1))
