"""Out again: what was imported leaves as it came, and others can read it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml import architectures
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.mmdit import MMDiT
from ml.models.official.convert import check
from ml.models.official.exports import Layout, export
from ml.models.official.files import OfficialError
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3
from ml.models.weights import Card, Origin

ORIGIN = Origin("mine", "released")
SMALL: dict[str, Any] = {"depth": 2, "hidden_size": 24, "num_heads": 2, "caption_channels": 8, "model_max_length": 4}
RELEASED: dict[str, Any] = {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "vec_in_dim": 4,
    "context_in_dim": 4,
    "hidden_size": 16,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": (4, 2, 2),
}
TINY: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
NETWORKS: list[tuple[Any, Any]] = [
    (STDiT, architectures.STDiT(**SMALL, input_size=(4, 4, 4))),
    (STDiT2, architectures.STDiT2(**SMALL)),
    (STDiT3, architectures.STDiT3(**SMALL)),
    (STDiT3, architectures.STDiT3(**SMALL, in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)),
    (MMDiT, architectures.MMDiT(**FLUX, **RELEASED)),
]
AUTOENCODERS: list[Any] = [
    architectures.StableDiffusionNet(**TINY),
    architectures.OpenSoraV12Net(**TINY, filters=8, num_res_blocks=1, num_groups=4),
    architectures.OpenSoraV13Net(ch=8, num_res_blocks=1, num_groups=4),
    architectures.HunyuanNet(**TINY),
]
Make = Callable[..., Any]


def card_of(config: Any) -> Card:
    return Card(config.kind, config.model_dump(mode="json"), ORIGIN)


def released(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights in a dtype, buffers in their own."""
    torch.manual_seed(0)
    state = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in network.named_parameters()}
    return {**network.state_dict(), **state}


def identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return set(found) == set(expected) and all(
        found[n].dtype == t.dtype
        and torch.equal(found[n].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
        for n, t in expected.items()
        if t.ndim
    )


def round_trip(official: Make, target: Make, parts: tuple[dict[str, Tensor], nn.Module, Any], layout: Layout) -> Any:
    state, network, config = parts
    checked = check(official(state), target(network, config))
    assert checked.report.fits, checked.report
    fresh = network.state_dict()
    ours = dict(checked.tensors()) | {name: fresh[name] for name in checked.initialised}
    return dict(export(official(ours), card_of(config), layout).tensors())


@pytest.mark.parametrize(("make", "config"), NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_transformer_leaves_as_it_came(
    official: Make, target: Make, make: Any, config: Any, dtype: torch.dtype
) -> None:
    state = released(make(config), dtype)
    assert identical(round_trip(official, target, (state, make(config), config), "opensora"), state)


@pytest.mark.parametrize("config", AUTOENCODERS, ids=lambda config: config.kind)
def test_every_autoencoder_leaves_as_it_came(official: Make, target: Make, config: Any) -> None:
    net = build_autoencoder(config).net
    state = released(net, torch.float16)
    assert identical(round_trip(official, target, (state, net, config), "opensora"), state)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_flux_leaves_as_it_came_from_any_layout_of_ours(
    official: Make, target: Make, fused: bool, halves: bool
) -> None:
    flux = architectures.MMDiT(**FLUX, fused_qkv=True, use_liger_rope=False, cond_embed=False)
    config = architectures.MMDiT(**FLUX, fused_qkv=fused, use_liger_rope=halves, cond_embed=True)
    state = released(MMDiT(flux), torch.bfloat16)
    assert identical(round_trip(official, target, (state, MMDiT(config), config), "flux"), state)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_2_0_is_exported_split_and_in_halves_from_any_layout(official: Make, fused: bool, halves: bool) -> None:
    config = architectures.MMDiT(**FLUX, fused_qkv=fused, use_liger_rope=halves, cond_embed=True)
    made = export(official(released(MMDiT(config), torch.float32)), card_of(config), "opensora")
    wanted = MMDiT(architectures.MMDiT(**FLUX, **RELEASED)).state_dict()
    assert {name: header.shape for name, header in made.headers.items()} == {
        n: tuple(t.shape) for n, t in wanted.items()
    }


def test_a_trained_condition_goes_along_and_a_silent_one_stays(official: Make) -> None:
    config = architectures.MMDiT(**FLUX, **RELEASED)
    trained = released(MMDiT(config), torch.float32)
    silent = {name: torch.zeros_like(t) if name.startswith("cond_in") else t for name, t in trained.items()}
    kept, left = (export(official(state), card_of(config), "flux") for state in (trained, silent))
    assert "cond_in.weight" in kept.headers
    assert "kept" in kept.notes[0]
    assert "cond_in.weight" not in left.headers
    assert "cond_in.weight" not in dict(left.tensors())


@pytest.mark.parametrize("config", [AUTOENCODERS[0], AUTOENCODERS[3]], ids=lambda config: config.kind)
def test_diffusers_builds_the_same_network_from_the_config(official: Make, config: Any) -> None:
    import diffusers

    net = build_autoencoder(config).net
    made = export(official(net.state_dict()), card_of(config), "diffusers")
    theirs = getattr(diffusers, made.config["_class_name"]).from_config(dict(made.config))
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: header.shape for name, header in made.headers.items()} == wanted


@pytest.mark.parametrize(
    ("config", "layout", "why"),
    [
        (NETWORKS[0][1], "flux", "FLUX.1's layout is for kind mmdit, these weights are stdit"),
        (NETWORKS[0][1], "diffusers", "diffusers has no network of kind stdit; it has sd, hunyuan"),
        (AUTOENCODERS[1], "diffusers", "no network of kind opensora_v1_2"),
    ],
)
def test_a_layout_that_a_network_does_not_have_is_refused(official: Make, config: Any, layout: Any, why: str) -> None:
    with pytest.raises(OfficialError, match=why):
        export(official({}), card_of(config), layout)


def test_weights_that_contradict_their_card_are_refused(official: Make) -> None:
    config = architectures.MMDiT(**FLUX, **RELEASED)
    state = MMDiT(config).state_dict()
    del state["double_blocks.0.img_attn.k_proj.weight"]
    with pytest.raises(OfficialError, match="cannot be exported"):
        export(official(state), card_of(config), "flux")
