"""Closed forms of the parts: rotary positions, time embedding, norms, modulation."""

import math

import pytest
import torch

from ml.models.layers import Modulation, RMSNorm, layer_norm, modulate, rope_angles, rotate, timestep_embedding

AXES = (4, 10, 10)


def _rotated(x: torch.Tensor, at: tuple[int, int, int]) -> torch.Tensor:
    angles = rope_angles(torch.tensor([at]), AXES, 10000.0)
    return rotate(x, angles.cos(), angles.sin())


def test_rotary_products_depend_on_the_difference_of_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 24, generator=generator).double() for _ in range(2))
    here = (_rotated(query, (2, 3, 5)) * _rotated(key, (1, 7, 0))).sum()
    moved = (_rotated(query, (2 + 9, 3 + 4, 5 + 11)) * _rotated(key, (1 + 9, 7 + 4, 0 + 11))).sum()
    assert torch.allclose(here, moved, atol=1e-12)
    assert not torch.allclose(here, (_rotated(query, (2, 3, 6)) * _rotated(key, (1, 7, 0))).sum(), atol=1e-3)


def test_rotation_keeps_lengths_and_leaves_the_origin_alone() -> None:
    x = torch.randn(1, 2, 1, 24, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(_rotated(x, (0, 0, 0)), x)
    assert torch.allclose(_rotated(x, (3, 1, 4)).norm(), x.norm())


def test_angles_of_the_axes_lie_side_by_side_and_pair_lane_j_with_j_plus_half() -> None:
    angles = rope_angles(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), AXES, 10000.0)
    assert angles.shape == (3, 12)
    assert [row.count_nonzero().item() for row in angles] == [2, 5, 5]
    assert angles[0, :2].tolist() == pytest.approx([1.0, 10000.0 ** -(2 / 4)])
    assert angles[1, 2:7].tolist() == pytest.approx([10000.0 ** -(2 * i / 10) for i in range(5)])
    x = torch.zeros(1, 1, 1, 24, dtype=torch.float64)
    x[..., 3] = 1.0
    turned = _rotated(x, (0, 1, 0))[0, 0, 0]
    angle = 10000.0 ** -(2 / 10)
    assert turned[3] == pytest.approx(math.cos(angle))
    assert turned[3 + 12] == pytest.approx(math.sin(angle))
    assert turned.count_nonzero() == 2


def test_time_embedding_starts_with_cosines_of_a_thousandfold_time() -> None:
    embedded = timestep_embedding(torch.tensor([0.0, 0.25]), 256)
    assert embedded.shape == (2, 256)
    assert torch.equal(embedded[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert embedded[1, 0].item() == pytest.approx(math.cos(250.0), abs=1e-4)
    assert embedded[1, 128].item() == pytest.approx(math.sin(250.0), abs=1e-4)
    assert embedded[1, 64].item() == pytest.approx(math.cos(250.0 * 10000 ** -(64 / 128)), abs=1e-4)


def test_rms_norm_has_unit_mean_square_times_its_scale() -> None:
    norm = RMSNorm(24).double()
    norm.scale.data.fill_(3.0)
    x = 7 * torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(norm(x).square().mean(-1), torch.full((5,), 9.0).double(), rtol=1e-6)


def test_rms_norm_of_bf16_is_computed_in_float32() -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(24).bfloat16()
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), exact.bfloat16())


def test_modulation_starts_silent_of_gate_and_counts_its_chunks() -> None:
    modulation = Modulation(8, 6)
    assert [tuple(chunk.shape) for chunk in modulation(torch.zeros(2, 8))] == [(2, 1, 8)] * 6
    assert modulation.lin.weight.shape == (48, 8)


def test_modulate_normalises_then_scales_and_shifts() -> None:
    x = 5 + 3 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    shift, scale = torch.full((2, 1, 8), 2.0).double(), torch.full((2, 1, 8), 0.5).double()
    assert torch.allclose(modulate(x, shift, scale), 1.5 * layer_norm(x) + 2)
    assert torch.allclose(layer_norm(x).mean(-1), torch.zeros(2, 4).double(), atol=1e-12)
