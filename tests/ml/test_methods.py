from typing import Any

import pytest
from pydantic import ValidationError

from ml import architectures
from ml.methods import Engine, Guard, Lora, Validation, engine_problems

PLAIN: dict[str, Any] = {
    "kind": "plain",
    "precision": "fp32",
    "grad_clip": 1.0,
    "accumulate": 1,
    "sequence_parallel": 2,
    "checkpoint_blocks": (0, 0),
}


def test_ranks_that_share_a_batch_are_the_product_of_the_ways_to_share_it() -> None:
    assert Engine.model_validate({**PLAIN, "tensor_parallel": 3}).model_ranks == 6


@pytest.mark.parametrize(
    ("over", "complaint"),
    [
        ({"sharding": "zero2"}, "engine plain takes sharding none or full, not zero2"),
        ({"kind": "colossal", "sharding": "full"}, "engine colossal takes sharding none or zero1 or zero2, not full"),
        ({"pipeline_parallel": 2}, "engine plain has no pipeline"),
        ({"recompute": "some"}, "'block' or 'selective'"),
        ({"zero": 2}, "Extra inputs are not permitted"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(over: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Engine.model_validate({**PLAIN, **over})


def test_a_guard_never_takes_a_leap_for_a_spike_unless_told() -> None:
    assert Guard().spike is None
    with pytest.raises(ValidationError):
        Guard(patience=0)


def test_validation_without_samples_needs_no_prompts() -> None:
    assert Validation(every=10, clips=2, timesteps=3).samples == 0


@pytest.mark.parametrize(
    ("over", "kernel", "complaint"),
    [
        ({"sequence_parallel": 3}, None, "sequence_parallel: 16 heads are not divisible by 3; sequence_mode: ring"),
        ({"sequence_parallel": 3, "sequence_mode": "ring"}, None, ""),
        ({"sequence_parallel": 3, "sequence_mode": "ring"}, (8, 8, -1), "16 heads are not divisible by 3"),
        ({"sequence_parallel": 1, "tensor_parallel": 5}, None, "tensor_parallel: 16 heads are not divisible by 5"),
        ({"sequence_parallel": 4, "tensor_parallel": 8}, None, "sequence_parallel: 16 heads are not divisible by 32"),
    ],
)
def test_heads_must_divide_where_they_are_shared_out(over: dict[str, Any], kernel: Any, complaint: str) -> None:
    found = engine_problems(Engine.model_validate({**PLAIN, **over}), architectures.STDiT3(kernel_size=kernel), None)
    assert (found == []) if not complaint else any(complaint in problem for problem in found)


def test_adapters_are_not_cut() -> None:
    engine = Engine.model_validate({**PLAIN, "sequence_parallel": 1, "tensor_parallel": 2})
    lora = Lora(rank=4, alpha=4, targets=("qkv",))
    assert "adapters are not cut" in engine_problems(engine, architectures.STDiT3(), lora)[0]
