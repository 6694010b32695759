"""Identities of the straight path."""

import pytest
import torch

from ml.diffusion import rectified_flow

SIGMA = 1e-5


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 3, 2, 4, 4, generator=generator).double() for _ in range(2))
    return data, noise


@pytest.mark.parametrize("sigma", [0.0, SIGMA, 0.1])
def test_ends_of_the_path(pair: tuple[torch.Tensor, torch.Tensor], sigma: float) -> None:
    data, noise = pair
    ends = [rectified_flow.interpolate(data, noise, torch.full((4,), t), sigma) for t in (0.0, 1.0)]
    assert torch.allclose(ends[0], data + sigma * noise)
    assert torch.equal(ends[1], noise)


@pytest.mark.parametrize("sigma", [0.0, SIGMA, 0.1])
def test_the_target_is_the_slope_of_the_path(pair: tuple[torch.Tensor, torch.Tensor], sigma: float) -> None:
    data, noise = pair
    early, late = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.6, 0.9, 0.35, 1.0]).double()
    points = [rectified_flow.interpolate(data, noise, t, sigma) for t in (early, late)]
    slope = (points[1] - points[0]) / rectified_flow.per_sample(late - early, data)
    assert torch.allclose(slope, rectified_flow.target(data, noise, sigma))


def test_each_sample_has_its_own_time(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    data, noise = pair
    t = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    together = rectified_flow.interpolate(data, noise, t, SIGMA)
    alone = [rectified_flow.interpolate(data[i : i + 1], noise[i : i + 1], t[i : i + 1], SIGMA) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_loss_is_the_mean_square_of_each_sample() -> None:
    prediction, wanted = torch.zeros(2, 3, 4), torch.stack([torch.ones(3, 4), torch.full((3, 4), 3.0)])
    assert rectified_flow.loss(prediction, wanted).tolist() == [1.0, 9.0]
    assert rectified_flow.loss(prediction.bfloat16(), wanted).dtype == torch.float32
