"""Attention against the plain softmax, in float64."""

import math

import pytest
import torch

from ml.models.attention import attention


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 33), (130, 130)])
def test_attention_is_the_plain_softmax(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 24, generator=generator).double() for n in (queries, keys, keys))
    plain = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(24), dim=-1) @ value
    assert torch.allclose(attention(query, key, value), plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 64, 24, generator=generator) for _ in range(3))
    exact = attention(query.double(), key.double(), value.double())
    found = attention(query.to(dtype), key.to(dtype), value.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < tolerance


def test_every_query_sees_every_key() -> None:
    """No mask: the gradient of the first output reaches the last value, as text in front must see the last frame."""
    query, key, value = (torch.ones(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    attention(query, key, value)[0, 0, 0].sum().backward()
    assert (value.grad != 0).all()
