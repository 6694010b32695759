"""Identities of the straight path, and the conventions of the three generations that use it."""

import pytest
import torch
from torch import Tensor

from ml.diffusion import rectified_flow
from ml.diffusion.means import per_sample
from ml.diffusion.rectified_flow import RectifiedFlow
from ml.processes import AreaShift, LinearShift
from ml.processes import RectifiedFlow as Section

SIGMA = 1e-5
V1 = RectifiedFlow(Section(law="v1_2", shift=AreaShift(law="v1_2"), drop_context=0.1))
V2 = RectifiedFlow(Section(law="v2_0", sigma_min=SIGMA, shift=LinearShift(), drop_context=0.3))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 3, 2, 4, 4, generator=generator).double() for _ in range(2))
    return data, noise


@pytest.mark.parametrize("sigma", [0.0, SIGMA, 0.1])
def test_ends_of_the_path(pair: tuple[Tensor, Tensor], sigma: float) -> None:
    data, noise = pair
    ends = [rectified_flow.interpolate(data, noise, torch.full((4,), t), sigma) for t in (0.0, 1.0)]
    assert torch.allclose(ends[0], data + sigma * noise)
    assert torch.equal(ends[1], noise)


@pytest.mark.parametrize("sigma", [0.0, SIGMA, 0.1])
def test_the_target_is_the_slope_of_the_path(pair: tuple[Tensor, Tensor], sigma: float) -> None:
    data, noise = pair
    early, late = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([0.6, 0.9, 0.35, 1.0]).double()
    points = [rectified_flow.interpolate(data, noise, t, sigma) for t in (early, late)]
    slope = (points[1] - points[0]) / per_sample(late - early, data)
    assert torch.allclose(slope, rectified_flow.target(data, noise, sigma))


def test_each_sample_has_its_own_time(pair: tuple[Tensor, Tensor]) -> None:
    data, noise = pair
    t = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    together = V2.noisy(data, noise, t)
    alone = [V2.noisy(data[i : i + 1], noise[i : i + 1], t[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_1_2_learns_data_minus_noise_in_half_of_its_channels(pair: tuple[Tensor, Tensor]) -> None:
    data, noise = pair
    times = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    output = torch.cat([data - noise, torch.full_like(data, 9.0)], dim=1)
    assert V1.losses(output, data, noise, times).tolist() == pytest.approx([0.0] * 4)
    assert torch.equal(V1.velocity(output, data), noise - data)
    assert torch.allclose(V1.noisy(data, noise, times)[1], 0.75 * data[1] + 0.25 * noise[1])
    assert V1.network_time(times).tolist() == [0.0, 250.0, 500.0, 1000.0]


def test_2_0_learns_noise_minus_data(pair: tuple[Tensor, Tensor]) -> None:
    data, noise = pair
    times = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    exact = (1 - SIGMA) * noise - data
    assert V2.losses(exact, data, noise, times).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert V2.errors(exact + 2, data, noise, times).tolist() == pytest.approx([4.0] * 4)
    assert V2.network_time(times).tolist() == [0.0, 0.25, 0.5, 1.0]


def test_frames_that_are_not_active_stay_clean_and_do_not_count(pair: tuple[Tensor, Tensor]) -> None:
    data, noise = pair
    active = torch.tensor([[True, False]] * 4)
    noisy = V1.noisy(data, noise, torch.full((4,), 0.5), active)
    assert torch.equal(noisy[:, :, 1], data[:, :, 1])
    assert torch.allclose(noisy[:, :, 0], (data + noise)[:, :, 0] / 2)
    output = torch.cat([data - noise, noise], dim=1)
    output[:, :, 1] += 5
    assert V1.losses(output, data, noise, torch.ones(4), active.float()).tolist() == pytest.approx([0.0] * 4)
    assert V1.losses(output, data, noise, torch.ones(4)).tolist() == pytest.approx([12.5] * 4)


def test_a_fraction_is_the_time_itself() -> None:
    assert V2.at(0.3, 2).tolist() == pytest.approx([0.3, 0.3])
