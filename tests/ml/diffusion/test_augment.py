"""Damage of training clips: what each kind leaves of a clip, and how often it happens."""

import pytest
import torch

from ml.diffusion.augment import blur_space, blur_time, damage
from ml.processes import Augmentation

NEVER = Augmentation(pixel_noise_chance=0, spatial_chance=0, temporal_chance=0)


def test_blurs_keep_what_is_constant_along_their_axes() -> None:
    """A clip that changes over time only is untouched by a blur in space, and the other way round."""
    over_time = torch.rand(2, 3, 8, 1, 1).expand(-1, -1, -1, 16, 16)
    over_space = torch.rand(2, 3, 1, 16, 16).expand(-1, -1, 8, -1, -1)
    assert torch.allclose(blur_space(over_time, 4), over_time, atol=1e-6)
    assert torch.allclose(blur_time(over_space, 4), over_space, atol=1e-6)
    assert (blur_space(over_space, 4) - over_space).abs().mean() > 0.05
    assert (blur_time(over_time, 4) - over_time).abs().mean() > 0.05


def test_a_blur_in_space_is_the_one_of_every_frame() -> None:
    video = torch.rand(2, 3, 5, 16, 24)
    frames = video.transpose(1, 2).flatten(0, 1)
    small = torch.nn.functional.interpolate(frames, scale_factor=0.5, mode="bilinear", align_corners=False)
    large = torch.nn.functional.interpolate(small, size=(16, 24), mode="bilinear", align_corners=False)
    assert torch.allclose(blur_space(video, 2).transpose(1, 2).flatten(0, 1), large, atol=1e-6)


def test_factors_that_leave_nothing_are_passed_over() -> None:
    picture = torch.rand(1, 3, 1, 16, 16)
    assert torch.equal(blur_time(picture, 8), picture)
    assert torch.equal(blur_space(picture, 1), picture)


def test_damage_happens_by_its_chances_and_repeats_with_its_seed() -> None:
    video = torch.zeros(1, 3, 4, 8, 8)
    section = NEVER.model_copy(update={"pixel_noise_chance": 0.5})
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor([damage(video, section, generator).std().item() for _ in range(600)])
    assert (spreads > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert spreads.max() < 0.45
    assert spreads[spreads > 0].mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(damage(video, NEVER, generator), video)
    first, again = (damage(video, Augmentation(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
