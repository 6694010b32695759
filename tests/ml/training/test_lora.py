"""Adapters start as nothing, learn alone, and leave a whole network under its own names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml import architectures
from ml.engines.plain import PlainEngine
from ml.engines.protocol import Moments
from ml.methods import Lora
from ml.models.mmdit import MMDiT
from ml.models.recompute import Recompute
from ml.models.stdit3 import STDiT3
from ml.sections import Adam
from ml.training.lora import LoraError, add_lora, merged, save_adapter
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=0.01, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
CPU = torch.device("cpu")
TARGETS = {
    "mmdit": ("q_proj", "v_proj", "img_attn.proj", "linear2"),
    "mmdit_fused": ("qkv", "linear1", "img_mlp.0"),
    "stdit3": ("attn.qkv", "cross_attn.kv_linear", "fc2"),
}
networks = pytest.mark.parametrize("name", list(TARGETS))


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "depth": 1}
    network: nn.Module
    if name == "stdit3":
        network = STDiT3(architectures.STDiT3(**small, caption_channels=12, class_dropout_prob=0.0))
        given = {
            "x": torch.randn(2, 4, 3, 8, 8),
            "timestep": torch.tensor([100.0, 700.0]),
            "y": torch.randn(2, 1, 5, 12),
        }
        sizes = {key: torch.full((2,), value) for key, value in (("fps", 24.0), ("height", 64.0), ("width", 64.0))}
        given |= {"mask": torch.ones(2, 5, dtype=torch.long), **sizes}
    else:
        small |= {"axes_dim": (4, 10, 10), "depth_single_blocks": 1, "in_channels": 16, "vec_in_dim": 8}
        network = MMDiT(architectures.MMDiT(**small, context_in_dim=12, fused_qkv=name == "mmdit_fused"))
        given = {"img_ids": torch.zeros(2, 24, 3), "txt_ids": torch.zeros(2, 8, 3), "timesteps": torch.rand(2)}
        given |= {"img": torch.randn(2, 24, 16), "txt": torch.randn(2, 8, 12), "y_vec": torch.randn(2, 8)}
    torch.manual_seed(1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    return network, given


def section(name: str, **over: Any) -> Lora:
    return Lora(**{"rank": 4, "alpha": 8.0, "targets": TARGETS[name], **over})


def engine_of(network: nn.Module, dtype: torch.dtype = torch.float32) -> PlainEngine:
    engine = PlainEngine(CPU, dtype, 1e9)
    engine.setup(network, adamw(ADAM), schedule(ADAM, 100))
    return engine


def train(engine: PlainEngine, given: dict[str, Tensor], steps: int) -> None:
    """Towards an output of one everywhere."""
    for _ in range(steps):
        engine.backward((engine.model(**given).float() - 1).square().mean())
        engine.step()


@networks
def test_fresh_adapters_leave_the_output_bit_for_bit(name: str) -> None:
    network, given = build(name)
    wanted = network(**given)
    generator = torch.get_rng_state()
    add_lora(network, section(name), seed=3)
    assert torch.equal(torch.get_rng_state(), generator), "the seed is the adapters' own"
    assert torch.equal(network(**given), wanted)
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in network.named_parameters() if "lora_" in key}
    again = build(name)[0]
    add_lora(again, section(name), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@networks
def test_a_step_changes_adapters_only_and_merging_says_the_same(name: str) -> None:
    network, given = build(name)
    plain = build(name)[0]
    add_lora(network, section(name), seed=3)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    engine = engine_of(network)
    assert all("lora_" in key for key in engine.masters())
    train(engine, given, 3)
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == set(engine.masters())
    wanted, trained = network(**given).detach(), engine.gather(engine.masters())
    assert not torch.allclose(wanted, plain(**given), atol=1e-3)
    state = merged(plain, section(name), trained)
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(**given), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_training_goes_on_where_it_stopped() -> None:
    network, given = build("mmdit")
    add_lora(network, section("mmdit"), seed=3)
    engine = engine_of(network)
    train(engine, given, 2)
    masters, live = engine.gather(engine.masters()), engine.moments()
    moments = Moments(engine.gather(live.mean), engine.gather(live.square), live.updates)
    train(engine, given, 2)
    again = build("mmdit")[0]
    add_lora(again, section("mmdit"), seed=4)
    resumed = engine_of(again)
    resumed.restore(masters, moments, 2)
    train(resumed, given, 2)
    assert all(torch.equal(a, b) for a, b in zip(engine.masters().values(), resumed.masters().values(), strict=True))


def test_adapters_train_in_bf16_with_recomputed_blocks_and_dropout() -> None:
    network, given = build("mmdit")
    add_lora(network, section("mmdit", dropout=0.5), seed=3)
    network.recompute, network.checkpoint_blocks = Recompute("selective"), (9, 9)
    engine = engine_of(network.train(), torch.bfloat16)
    short = {key: tensor.bfloat16() if key in ("img", "txt", "y_vec") else tensor for key, tensor in given.items()}
    train(engine, short, 2)
    assert all(tensor.dtype == torch.float32 and bool(tensor.any()) for tensor in engine.masters().values())


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    from peft import PeftModel

    network, given = build("mmdit")
    add_lora(network, section("mmdit"), seed=3)
    engine = engine_of(network)
    train(engine, given, 2)
    save_adapter(tmp_path, section("mmdit"), engine.gather(engine.masters()))
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    theirs = PeftModel.from_pretrained(build("mmdit")[0], str(tmp_path))
    assert torch.equal(theirs(**given), network(**given))


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    network, _ = build("mmdit")
    with pytest.raises(LoraError, match=r"no linear layer of MMDiT ends in 'to_q'; near it are .*q_proj"):
        add_lora(network, section("mmdit", targets=("to_q",)), 0)
    with pytest.raises(LoraError, match=r"ends in 'img_atn.proj'; near it are img_attn.proj"):
        add_lora(network, section("mmdit", targets=("q_proj", "img_atn.proj")), 0)
    add_lora(network, section("mmdit"), 0)
    with pytest.raises(LoraError, match="has adapters already"):
        add_lora(network, section("mmdit"), 0)
    adapters = {key: tensor for key, tensor in network.state_dict().items() if "lora_" in key}
    with pytest.raises(LoraError, match="no such layer"):
        merged(build("mmdit_fused")[0], section("mmdit"), adapters)
    adapters.pop(next(iter(adapters)))
    with pytest.raises(LoraError, match="is there alone"):
        merged(build("mmdit")[0], section("mmdit"), adapters)
    with pytest.raises(LoraError, match="not the adapters"):
        merged(build("mmdit")[0], section("mmdit"), {})
