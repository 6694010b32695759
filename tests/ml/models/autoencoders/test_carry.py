"""Lanes through norm and SiLU: where they lie, that what they carry comes out, and that nothing else disturbs it."""

import pytest
import torch
from torch import nn

from ml.models.autoencoders import carry


@pytest.mark.parametrize(
    ("num_signals", "group", "width", "signals", "constants"),
    [
        (3, 8, 8, (0, 2, 4), (6,)),
        (4, 4, 16, (0, 4, 8, 12), (2, 6, 10, 14)),
        (4, 16, 10, (0, 2, 4, 6), (8,)),
        (4, 8, 128, (0, 2, 4, 8), (6, 14)),
        (4, 16, 8, (0, 2, 4, 6), ()),
        (3, 2, 8, (0, 2, 4), ()),
    ],
)
def test_lanes_share_no_channel_and_leave_room_for_constants(
    num_signals: int, group: int, width: int, signals: tuple[int, ...], constants: tuple[int, ...]
) -> None:
    found = carry.lanes(num_signals, group, width)
    assert (found.signals, found.constants) == (signals, constants)
    if constants:
        assert {c // group for c in signals} == {c // group for c in constants}


def test_there_are_no_lanes_where_even_the_signals_do_not_fit() -> None:
    assert carry.lanes(4, 8, 7) is None


@torch.no_grad()
@pytest.mark.parametrize(("groups", "decibels"), [(1, 20), (2, 20), (4, 20)])
def test_signals_come_through_a_norm_and_an_activation(groups: int, decibels: float) -> None:
    """16 channels; the norm divides by nearly a constant, so even the size of a signal survives."""
    torch.manual_seed(0)
    into, through, out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
    net = nn.Sequential(into, through, nn.GroupNorm(groups, 16), nn.SiLU(), out)
    carry.soften(net)
    found = carry.lanes(3, 16 // groups, 16)
    carry.scatter(into, found)
    carry.keep(through, found)
    carry.gather(out, found)
    x = torch.rand(2, 3, 12, 12) * torch.tensor([0.2, 1.0, 0.6])[:, None, None] - 0.3
    error = (net(x) - x).square().mean()
    assert 10 * torch.log10(x.square().mean() / error) > decibels


@torch.no_grad()
def test_doubled_channels_are_the_middle_and_the_present_frame() -> None:
    found = carry.lanes(2, 8, 8)
    convolution = nn.Conv3d(8, 16, (3, 1, 1))
    carry.soften(convolution)
    carry.keep_doubled(convolution, found)
    x = torch.randn(1, 8, 3, 1, 1)
    doubled = convolution(x).flatten()
    for channel in (0, 1, 2, 3):
        _, before, now = x[0, channel].flatten().tolist()
        assert doubled[2 * channel].item() == pytest.approx((before + now) / 2)
        assert doubled[2 * channel + 1].item() == pytest.approx(now)
    assert doubled[8:12].tolist() == [carry.CONSTANT, carry.CONSTANT, -carry.CONSTANT, -carry.CONSTANT]


@torch.no_grad()
def test_constants_pass_a_convolution_without_bias() -> None:
    found = carry.lanes(2, 8, 8)
    convolution = nn.Conv3d(8, 8, 1, bias=False)
    carry.keep(convolution, found)
    x = torch.randn(1, 8, 1, 1, 1)
    for channel in (0, 1, 2, 3, 4, 5):
        assert convolution(x)[0, channel].item() == pytest.approx(x[0, channel].item())


@torch.no_grad()
def test_the_second_half_of_the_moments_starts_as_small_log_variances() -> None:
    convolution = nn.Conv2d(6, 8, 1)
    carry.quiet(convolution, 4)
    moments = convolution(torch.randn(1, 6, 2, 2))
    assert (moments[:, 4:] == carry.FIRST_LOGVAR).all()
    assert not (moments[:, :4] == carry.FIRST_LOGVAR).any()


def test_only_convolutions_carry() -> None:
    with pytest.raises(TypeError, match="SiLU is no convolution"):
        carry.quiet(nn.SiLU(), 4)
