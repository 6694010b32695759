"""Acceptance: twenty steps of two networks are the same twenty steps, however they are spread over processes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Curves = Callable[..., Any]
SPREAD: dict[str, tuple[dict[str, Any], int]] = {
    "ddp": ({"accumulate": 2}, 2),
    "fsdp2": ({"accumulate": 2, "sharding": "full"}, 2),
}


@pytest.mark.parametrize("network", ["mmdit", "stdit3"])
@pytest.mark.parametrize("way", SPREAD)
def test_ranks_take_the_steps_of_one_process(curves: Curves, network: str, way: str) -> None:
    section, count = SPREAD[way]
    curves(network, section, count).agrees(curves(network, {}))


@pytest.mark.parametrize(
    ("section", "count"),
    [
        ({"sharding": "full", "sequence_parallel": 2}, 2),
        ({"sharding": "full", "sequence_parallel": 2, "sequence_mode": "ring", "accumulate": 2}, 4),
        ({"sharding": "full", "tensor_parallel": 2, "accumulate": 2}, 4),
        ({"sharding": "none", "tensor_parallel": 2, "accumulate": 2}, 4),
    ],
)
def test_shards_may_be_of_cut_tokens_and_weights(curves: Curves, section: dict[str, Any], count: int) -> None:
    curves("mmdit", section, count, few=True).agrees(curves("mmdit", {}, few=True))


@pytest.mark.parametrize(("way", "network"), [("ddp", "mmdit"), ("fsdp2", "mmdit"), ("fsdp2", "stdit3")])
def test_bf16_in_ranks_is_as_good_as_in_one_process(curves: Curves, network: str, way: str) -> None:
    """bf16 keeps 8 bits, 4e-3: sums in another order are nearer to each other than bf16 is to fp32."""
    section, count = SPREAD[way]
    half, alone = (curves(network, {**over, "precision": "bf16"}, n) for over, n in ((section, count), ({}, 1)))
    full = curves(network, {})
    assert half.losses == pytest.approx(alone.losses, rel=4e-3)
    assert half.norms == pytest.approx(alone.norms, rel=3e-2)
    assert 0 < distance(half.masters, alone.masters) < 1.2 * distance(alone.masters, full.masters)
    assert {master.dtype for master in half.masters.values()} == {torch.float32}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))
