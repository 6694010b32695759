import pytest
import torch

from ml.training.ema import EMA


def test_the_average_is_the_closed_form() -> None:
    """From 0 towards a constant 1: after n updates 1 - decay^n."""
    ema = EMA({"w": torch.zeros(3)}, decay=0.9)
    for _ in range(12):
        ema.update({"w": torch.ones(3)})
    assert ema.shards["w"].tolist() == pytest.approx([1 - 0.9**12] * 3, rel=1e-6)


def test_the_average_is_kept_in_fp32_and_apart_from_the_weights() -> None:
    """At decay 0.9999 a bf16 average would not move at all."""
    weights = {"w": torch.ones(2, dtype=torch.float32)}
    ema = EMA(weights, decay=0.9999)
    weights["w"].fill_(2.0)
    assert ema.shards["w"].tolist() == [1.0, 1.0]
    ema.update(weights)
    assert ema.shards["w"].dtype == torch.float32
    assert ema.shards["w"].tolist() == pytest.approx([1.0001] * 2, rel=1e-6)


def test_a_saved_average_comes_back_exactly() -> None:
    ema, other = EMA({"w": torch.randn(5)}, 0.5), EMA({"w": torch.zeros(5)}, 0.5)
    other.restore({name: tensor.clone() for name, tensor in ema.shards.items()})
    assert torch.equal(other.shards["w"], ema.shards["w"])
