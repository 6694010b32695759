from typing import Any

import pytest
from pydantic import ValidationError

from ml import architectures
from ml.methods import Engine, Guard, Lora, Validation, engine_problems
from ml.recipe import Recipe
from ml.sections import AutoencoderStage

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


BLOCKS: dict[str, Any] = {"checkpoint_blocks": (1, 0)}


@pytest.mark.parametrize(
    ("over", "complaint"),
    [
        ({"sharding": "zero2"}, "engine plain takes sharding none or full, not zero2"),
        ({"kind": "colossal", "sharding": "full"}, "engine colossal takes sharding none or zero1 or zero2, not full"),
        ({"pipeline_parallel": 2}, "engine plain has no pipeline"),
        ({"recompute": "some"}, "'block' or 'selective'"),
        ({"zero": 2}, "Extra inputs are not permitted"),
        ({"fp8": True}, "precision is fp32: set it to bf16"),
        ({"fp8": True, "precision": "bf16", "tensor_parallel": 2}, "set tensor_parallel to 1, or fp8 to false"),
        ({"compile": True, "offload": True, "recompute": "selective", **BLOCKS}, "set offload to false, recompute to"),
        ({"offload": True}, r"offload works on the blocks of checkpoint_blocks, which is \[0, 0\]"),
        ({"recompute": "selective"}, "recompute: selective works on the blocks of checkpoint_blocks"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(over: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Engine.model_validate({**PLAIN, **over})


def test_levers_that_have_blocks_to_work_on_go_together() -> None:
    for over in ({"recompute": "selective", "offload": True}, {"recompute": "selective", "compile": True}):
        assert Engine.model_validate({**PLAIN, **BLOCKS, **over}).checkpoint_blocks == (1, 0)
    assert Engine.model_validate({**PLAIN, "fp8": True, "precision": "bf16", "sharding": "full"}).fp8


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"fp8": True, "precision": "bf16"}, "engine.fp8 work on blocks of transformers only"),
        ({"compile": True, "checkpoint_blocks": [1, 1]}, "engine.checkpoint_blocks and engine.compile work on blocks"),
        ({"checkpoint_blocks": [1, 1], "offload": True}, "engine.checkpoint_blocks work on blocks"),
        ({"sharding": "full"}, "an autoencoder is trained whole or cut by tensor_parallel"),
    ],
)
def test_an_autoencoder_has_no_levers_of_transformers(over: dict[str, Any], words: str) -> None:
    stage = Recipe.load("v2_0", "tiny").autoencoder.stages[0].model_dump()
    with pytest.raises(ValidationError, match=f"vae_stage1: {words}"):
        AutoencoderStage.model_validate({**stage, "engine": {**stage["engine"], **over}})


def test_a_guard_never_takes_a_leap_for_a_spike_unless_told() -> None:
    assert Guard().spike is None
    with pytest.raises(ValidationError):
        Guard(patience=0)


def test_validation_without_samples_needs_no_prompts() -> None:
    assert Validation(every=10, clips=2, timesteps=3).prompts == ()


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
