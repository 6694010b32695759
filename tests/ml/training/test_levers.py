"""Levers change how a network computes, and neither its names nor (but for rounding) what it says."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml import architectures, methods
from ml.engines.blocks import compile_blocks
from ml.engines.make import make_engine
from ml.models.mmdit import MMDiT
from ml.models.recompute import Recompute
from ml.models.stdit3 import STDiT3
from ml.sections import Adam, Compute
from ml.training.levers import Converted, LeverError, convert_to_fp8, prepare
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=0.01, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
TWO = Compute(accelerators="CPU:2", nodes=1, price="none", processes=2)
ENGINE: dict[str, Any] = {
    "kind": "plain",
    "precision": "fp32",
    "grad_clip": 1.0,
    "accumulate": 1,
    "sequence_parallel": 1,
    "checkpoint_blocks": (0, 0),
}


def section(**over: Any) -> methods.Engine:
    return methods.Engine(**{**ENGINE, **over})


def mmdit(width: int = 48, depth: int = 1) -> MMDiT:
    torch.manual_seed(0)
    axes = (width // 2 - 16, 8, 8)
    sizes: dict[str, Any] = {"in_channels": 16, "vec_in_dim": 8, "context_in_dim": 12, "fused_qkv": False}
    hyper: dict[str, Any] = {"hidden_size": width, "num_heads": 2, "axes_dim": axes, "depth": depth}
    network = MMDiT(architectures.MMDiT(**hyper, depth_single_blocks=depth, **sizes))
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    return network


def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    places = {"img_ids": torch.zeros(2, 24, 3), "txt_ids": torch.zeros(2, 8, 3), "timesteps": torch.rand(2)}
    return {"img": torch.randn(2, 24, 16), "txt": torch.randn(2, 8, 12), "y_vec": torch.randn(2, 8), **places}


def step(network: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and all gradients."""
    inputs = {name: x.to(dtype) if name in ("img", "txt", "y_vec") else x for name, x in given().items()}
    network.zero_grad()
    out = network(**inputs)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def test_the_network_is_told_how_to_recompute() -> None:
    network = mmdit()
    prepare(network, section(checkpoint_blocks=(8, 100), recompute="selective", offload=True))
    assert network.checkpoint_blocks == (8, 100)
    assert network.recompute == Recompute("selective", offload=True, compiled=False)
    prepare(network, section(compile=True))
    assert network.recompute == Recompute("block", offload=False, compiled=True)


def test_a_network_without_blocks_to_recompute_says_so() -> None:
    prepare(nn.Linear(2, 2), section())
    with pytest.raises(LeverError, match=r"Linear cannot recompute its blocks; set checkpoint_blocks to \[0, 0\]"):
        prepare(nn.Linear(2, 2), section(checkpoint_blocks=(1, 0)))


def test_fp8_changes_the_linear_layers_of_the_blocks_and_no_name_or_weight() -> None:
    network = mmdit()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    prepare(network, section(fp8=True, precision="bf16"))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    kinds = {name: type(m).__name__ for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    converted = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert converted == {name for name in kinds if "blocks" in name and not name.endswith(".lin")}
    assert len(converted) == 2 * 6 + 4


def test_fp8_is_near_bf16_and_trains_every_weight() -> None:
    plain, short = mmdit().bfloat16(), mmdit()
    prepare(short, section(fp8=True, precision="bf16"))
    wanted, found = step(plain, torch.bfloat16), step(short.bfloat16(), torch.bfloat16)
    assert len(wanted) == len(found) > 30
    errors = [float((a - b).float().norm() / a.float().norm()) for a, b in zip(wanted, found, strict=True)]
    assert 0 < errors[0] < 0.1
    assert sorted(errors)[len(errors) // 2] < 0.15


def test_layers_whose_sizes_sixteen_does_not_divide_are_left_and_counted() -> None:
    torch.manual_seed(0)
    hyper: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "depth": 1, "caption_channels": 12, "mlp_ratio": 1.5}
    network = STDiT3(architectures.STDiT3(**hyper))
    assert convert_to_fp8(network) == Converted(converted=2 * 5, left=2 * 2)
    with pytest.raises(LeverError, match="no linear layer in its blocks"):
        convert_to_fp8(nn.Sequential(nn.Linear(16, 16)))


def _norms(sharding: str) -> list[float]:
    """Gradient norms of three steps in 8 bits."""
    asked = section(fp8=True, precision="bf16", sharding=sharding)
    engine, network, norms = make_engine(asked, TWO), mmdit(), list[float]()
    prepare(network, asked)
    engine.setup(network, adamw(ADAM), schedule(ADAM, 10))
    inputs = {name: x.bfloat16() if name in ("img", "txt", "y_vec") else x for name, x in given().items()}
    for _ in range(3):
        with engine.accumulate(last=True):
            engine.backward((engine.model(**inputs).float() - engine.data_rank).square().mean())
        norms.append(engine.step())
    engine.close()
    return norms


def test_layers_in_8_bits_are_sharded_as_others_are(ranks: Any) -> None:
    """FSDP2 gathers their weights in bf16, which they then shorten: the steps are those of DDP."""
    full, none = (ranks(_norms, sharding) for sharding in ("full", "none"))
    assert full[0] == full[1]
    assert full[0][0] == pytest.approx(none[0][0], rel=1e-4)
    assert full[0] == pytest.approx(none[0], rel=0.02), "which way Adam first goes may be one of rounding"


def test_without_torchao_fp8_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(LeverError, match="pip install torchao, or set fp8 to false"):
        convert_to_fp8(mmdit())


WAYS = [{}, {"sharding": "full"}, {"sequence_parallel": 2}, {"sequence_parallel": 2, "sequence_mode": "ring"}]


@pytest.mark.parametrize("over", WAYS, ids=str)
def test_recomputation_repeats_collectives_alike_on_all_ranks(ranks: Any, over: dict[str, Any]) -> None:
    for same in ranks(_same_weights, over, count=2):
        assert same == [True] * 4


def _same_weights(over: dict[str, Any]) -> list[bool]:
    """Whether two updates end at the same weights with each way to recompute as with none."""
    ends = [_updated(section(**over))]
    for kind in ("block", "selective"):
        for offload in (False, True):
            ends.append(_updated(section(checkpoint_blocks=(9, 9), recompute=kind, offload=offload, **over)))
    return [all(torch.equal(end[name], ends[0][name]) for name in ends[0]) for end in ends[1:]]


def _updated(engine_section: methods.Engine) -> dict[str, Tensor]:
    engine, network = make_engine(engine_section, TWO), mmdit(depth=2)
    prepare(network, engine_section)
    engine.setup(network, adamw(ADAM), schedule(ADAM, 10))
    for _ in range(2):
        loss = (engine.model(**given()) - engine.data_rank).square().mean()
        with engine.accumulate(last=True):
            engine.backward(loss)
        engine.step()
    return {name: tensor.clone() for name, tensor in engine.masters().items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize(
    "over",
    [{}, {"checkpoint_blocks": (9, 9)}, {"checkpoint_blocks": (9, 9), "recompute": "selective"}],
    ids=["none", "block", "selective"],
)
def test_compiled_blocks_say_and_learn_the_same(over: dict[str, Any], ranks: Any) -> None:
    """With every way to recompute; both blocks of a kind share one compilation. In a process of its own, because the
    compiler's imports depend on what a process has imported before.
    """
    [(wanted, found)] = ranks(eager_and_compiled, over, count=1, timeout=280)
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def eager_and_compiled(over: dict[str, Any]) -> tuple[Any, Any]:
    """What a step of the same network gives, eager and compiled."""
    wanted, network = step(mmdit(depth=2)), mmdit(depth=2)
    prepare(network, section(compile=True, **over))
    compile_blocks(network)
    return wanted, step(network)


@pytest.mark.gpu
def test_on_hopper_fp8_computes_and_pads_any_number_of_tokens() -> None:
    network = mmdit(128)
    prepare(network, section(fp8=True, precision="bf16"))
    network.to("cuda", torch.bfloat16)
    inputs = {name: x.cuda() for name, x in given().items()}
    inputs = {name: x.bfloat16() if name in ("img", "txt", "y_vec") else x for name, x in inputs.items()}
    inputs["img"], inputs["img_ids"] = inputs["img"][:, :21], inputs["img_ids"][:, :21]
    network(**inputs).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
