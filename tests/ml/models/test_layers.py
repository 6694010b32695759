"""Closed forms of the parts: time embedding, norms, modulation."""

import math

import pytest
import torch

from ml.models.layers import Modulation, RMSNorm, layer_norm, modulate, timestep_embedding


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
