"""Tensor parallelism against one process: outputs, the gradient of every weight, whole training curves, errors."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from ml.engines.protocol import EngineError
from ml.engines.tensor import Cut, shard_
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.mmdit import MMDiT
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3

Ranks = Callable[..., list[Any]]
TEXT = {"caption_channels": 8, "model_max_length": 5, "class_dropout_prob": 0.0}
DIT = {"hidden_size": 48, "depth": 1, "num_heads": 4, "drop_path": 0.0, **TEXT}
FACTS = {"height": torch.tensor([32.0, 32.0]), "width": torch.tensor([64.0, 64.0]), "fps": torch.tensor([8.0, 24.0])}


def test_a_cut_takes_apart_and_joins() -> None:
    full = torch.arange(24.0).view(12, 2)
    cut = Cut(0, (4, 8))
    shards = [cut.take(full, rank, 2) for rank in range(2)]
    assert shards[0][:, 0].tolist() == [0, 2, 8, 10, 12, 14]
    assert torch.equal(cut.join(shards), full)
    across = Cut(1, (2,))
    assert torch.equal(across.join([across.take(full, rank, 2) for rank in range(2)]), full)


def mmdit(fused: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"in_channels": 16, "vec_in_dim": 12, "context_in_dim": 8, "hidden_size": 48, "num_heads": 4}
    network = MMDiT(**sizes, depth=1, depth_single_blocks=1, axes_dim=(4, 4, 4), fused_qkv=fused, qkv_bias=True)
    ids = torch.arange(24).view(1, 8, 3).expand(2, -1, -1).float()
    given = {"img": torch.randn(2, 8, 16), "img_ids": ids, "txt": torch.randn(2, 5, 8), "txt_ids": ids[:, :5] * 0}
    return network, {**given, "timesteps": torch.rand(2), "y_vec": torch.randn(2, 12)}


def stdit(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    facts = {**FACTS, "num_frames": torch.tensor([4.0, 4.0]), "ar": torch.tensor([2.0, 2.0])}
    network: nn.Module
    channels = 4
    if kind == "stdit":
        network, facts = STDiT(input_size=(4, 4, 8), **DIT), {}
    elif kind == "stdit2":
        network = STDiT2(qk_norm=True, **DIT)
    elif kind == "stdit3":
        network, facts = STDiT3(**DIT), FACTS
    else:
        channels, facts = 16, FACTS
        network = STDiT3(in_channels=16, kernel_size=(2, 2, -1), use_spatial_rope=True, **{**DIT, "num_heads": 2})
    x = torch.randn(2, channels, 4, 4, 8)
    text = {"y": torch.randn(2, 1, 5, 8), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    return network, {"x": x, "timestep": torch.tensor([10.0, 700.0]), **text, **facts}


def text_encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 4, "vocab_size": 30}
    network = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return network, {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": mask}


def autoencoder(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from ml.recipe import Recipe

    network = build_autoencoder(Recipe.load(name, "tiny").autoencoder.net)
    network.initialise()
    frames = {"v2_0_hc": 4, "v1_3": 5, "v2_0": 5}
    return network, {"video": torch.rand(1, 3, frames.get(name, 4), 32, 32) * 2 - 1}


def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    if name.startswith("mmdit"):
        network, given = mmdit(name.endswith("fused"))
    elif name == "t5":
        network, given = text_encoder()
    elif name.startswith("v"):
        network, given = autoencoder(name)
    else:
        network, given = stdit(name)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return network, given


def passed(name: str, group: Any = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and every full gradient, here or in the ranks of a group; runs in float64."""
    found, gradients, _ = shared(name, group)
    return found, gradients


def shared(name: str, group: Any) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """Outputs, every full gradient, and which share of the network's numbers is here."""
    network, given = case(name)
    network.double()
    numel = sum(weight.numel() for weight in network.parameters())
    cuts = {} if group is None else shard_(network, group)
    share = sum(weight.numel() for weight in network.parameters()) / numel
    wide = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    extra = {"generator": torch.Generator().manual_seed(3)} if name.startswith("v") else {}
    out = network(**wide, **extra)
    outs = [out] if isinstance(out, Tensor) else [out.video] if name.startswith("v") else [out.last_hidden_state]
    sum((one.double() * torch.linspace(0, 1, one.numel()).view(one.shape)).sum() for one in outs).backward()
    gradients = {key: weight.grad for key, weight in network.named_parameters() if weight.grad is not None}
    for key, cut in cuts.items():
        shards = [torch.empty_like(gradients[key]) for _ in range(2)]
        dist.all_gather(shards, gradients[key].contiguous(), group=group)
        gradients[key] = cut.join(shards)
    return [one.detach() for one in outs], gradients, share


def passed_on_ranks() -> dict[str, Any]:
    dist.init_process_group("gloo")
    return {name: shared(name, dist.group.WORLD) for name in NAMES}


KINDS = ("mmdit split", "mmdit fused", "stdit", "stdit2", "stdit3", "stdit3 windowed", "t5")
NAMES = (*KINDS, "v1_0", "v1_2", "v1_3", "v2_0", "v2_0_hc")
# How much of each a rank of two holds at these sizes: the half, and the other half of what is whole on every rank.
SHARES = dict(
    zip(NAMES, (0.708, 0.708, 0.696, 0.805, 0.689, 0.719, 0.549, 0.517, 0.508, 0.502, 0.507, 0.590), strict=True)
)


# What is whole on every rank inside the blocks: biases that join a sum, norms, modulation and its tables.
WHOLE = re.compile(
    r"\w*(proj|mlp\.(2|fc2)|linear2)\.bias|\w*norm\.(weight|scale)|lin\.(weight|bias)|scale_shift_table\w*"
)


def left_whole() -> dict[str, tuple[list[str], list[str]]]:
    """Of every kind: weights of the blocks that were cut, and those that were not."""
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        network, _ = case(kind)
        names = [key for key, _ in network.named_parameters() if re.search(r"(blocks|\bblock)\.\d", key)]
        cuts = shard_(network, dist.group.WORLD)
        found[kind] = [key for key in names if key in cuts], [key for key in names if key not in cuts]
    return found


def test_every_wide_layer_of_a_block_is_cut(ranks: Ranks) -> None:
    for kind, (cut, left) in ranks(left_whole)[0].items():
        assert [key for key in left if not re.search(rf"(^|\.)({WHOLE.pattern})$", key)] == [], kind
        assert len([key for key in cut if key.endswith("weight")]) >= 4, kind


@pytest.fixture(scope="module")
def on_two_ranks(ranks: Ranks) -> list[dict[str, Any]]:
    """Every network on the same two ranks: by name, what each rank has."""
    return ranks(passed_on_ranks, timeout=280)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(name: str, on_two_ranks: list[dict[str, Any]]) -> None:
    """Outputs and the gradient of every weight, on both ranks, to float64's rounding; shards are a part of them."""
    outs, gradients = passed(name)
    for found, theirs, share in (on_rank[name] for on_rank in on_two_ranks):
        assert share == pytest.approx(SHARES[name], abs=1e-3)
        for one, other in zip(outs, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert theirs.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                theirs[key], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, k=key: f"{k} {text}"
            )


@pytest.mark.parametrize("name", ["mmdit", "stdit3"])
def test_twenty_steps_on_two_tensor_ranks_are_those_of_one(name: str, curves: Any) -> None:
    alone = curves(name, {"accumulate": 4})
    alone.agrees(curves(name, {"accumulate": 4, "tensor_parallel": 2}, count=2))


def cut_badly(sizes: dict[str, Any]) -> str:
    dist.init_process_group("gloo")
    network = STDiT3(**{**DIT, **sizes})
    with pytest.raises(EngineError) as raised:
        shard_(network, dist.group.WORLD)
    return str(raised.value)


def cut_nothing() -> str:
    dist.init_process_group("gloo")
    with pytest.raises(EngineError) as raised:
        shard_(nn.Linear(4, 4), dist.group.WORLD)
    return str(raised.value)


def test_what_does_not_divide_is_refused(ranks: Ranks) -> None:
    assert "does not divide the 3 heads of spatial_blocks.0.attn" in ranks(cut_badly, {"num_heads": 3})[0]
    assert "nothing in Linear can be cut" in ranks(cut_nothing)[0]
