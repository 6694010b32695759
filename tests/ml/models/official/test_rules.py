"""Conversions of every source, on real networks: names, values, and outputs that must agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml import architectures
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.mmdit import MMDiT
from ml.models.official.convert import check
from ml.models.official.files import OfficialError
from ml.models.official.rules import fit_caption, rules_for, widen
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3

WIDTH, TEXT = 48, 32
SMALL: dict[str, Any] = {"depth": 2, "hidden_size": WIDTH, "num_heads": 2, "caption_channels": TEXT}
RELEASED: dict[str, Any] = {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 48,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": (4, 10, 10),
}
Make = Callable[..., Any]


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def pixart(tokens: int, **extra: tuple[int, ...]) -> dict[str, Tensor]:
    """A small PixArt under its own names (PixArt-alpha/PixArt-alpha and PixArt-Sigma, .pth files)."""
    shapes = {
        "pos_embed": (1, 16, WIDTH),
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "t_block.1.weight": (6 * WIDTH, WIDTH),
        "t_block.1.bias": (6 * WIDTH,),
        "y_embedder.y_embedding": (tokens, TEXT),
        "y_embedder.y_proj.fc1.weight": (WIDTH, TEXT),
        "y_embedder.y_proj.fc1.bias": (WIDTH,),
        "y_embedder.y_proj.fc2.weight": (WIDTH, WIDTH),
        "y_embedder.y_proj.fc2.bias": (WIDTH,),
        "final_layer.linear.weight": (32, WIDTH),
        "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, WIDTH),
        **extra,
    }
    block = {"attn.qkv": 3, "attn.proj": 1, "cross_attn.q_linear": 1, "cross_attn.kv_linear": 2, "cross_attn.proj": 1}
    for i in range(2):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, WIDTH)
        rows = {**{name: (n * WIDTH, WIDTH) for name, n in block.items()}, "mlp.fc1": (4 * WIDTH, WIDTH)}
        for name, shape in {**rows, "mlp.fc2": (WIDTH, 4 * WIDTH)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    torch.manual_seed(1)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# --- 1.0 to 1.3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (STDiT, architectures.STDiT(**SMALL, input_size=(4, 4, 4))),
        (STDiT2, architectures.STDiT2(**SMALL)),
        (STDiT3, architectures.STDiT3(**SMALL)),
        (STDiT3, architectures.STDiT3(**SMALL, in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)),
    ],
)
def test_a_release_of_its_own_generation_passes_untouched(official: Make, target: Make, make: Any, config: Any) -> None:
    network = randomised(make(config))
    state = network.state_dict()
    checked = check(official(state), target(network, config))
    assert checked.report.fits, checked.report
    computed = {"pos_embed", "pos_embed_temporal"} & set(state)
    assert checked.report.counts()["used"] == len(state) - len(computed)
    arrived = dict(checked.tensors())
    assert all(arrived[name] is state[name] for name in state if name not in computed)
    assert {entry.name for entry in checked.report.having("dropped")} == computed
    assert set(checked.initialised) == computed


def test_windowed_weights_without_condition_start_with_none(official: Make, target: Make) -> None:
    config = architectures.STDiT3(**SMALL, in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)
    state = {n: t for n, t in STDiT3(config).state_dict().items() if not n.startswith("x_embedder_cond")}
    checked = check(official(state), target(STDiT3(config), config))
    assert checked.report.fits
    assert len(checked.initialised) == 4
    assert checked.report.having("initialised")[0].how.startswith("starts at zero")


@pytest.mark.parametrize(("have", "want"), [(5, 8), (8, 5), (5, 5)])
def test_the_null_caption_is_cut_or_its_last_row_repeated(have: int, want: int) -> None:
    null = torch.randn(have, 3)
    fitted = fit_caption(null, want)
    assert fitted.shape == (want, 3)
    assert torch.equal(fitted[: min(have, want)], null[:want])
    assert all(torch.equal(row, null[-1]) for row in fitted[have:])


# --- PixArt -------------------------------------------------------------------------------------------------------


def test_pixart_alpha_becomes_the_spatial_half_of_stdit(official: Make, target: Make) -> None:
    config = architectures.STDiT(**SMALL, input_size=(4, 8, 8))
    state = pixart(120)
    checked = check(official(state), target(STDiT(config), config))
    assert checked.report.fits, checked.report
    assert checked.report.source == "pixart_alpha"
    arrived = dict(checked.tensors())
    assert torch.equal(arrived["x_embedder.proj.weight"], state["x_embedder.proj.weight"][:, :, None])
    unchanged = set(state) - {"pos_embed", "x_embedder.proj.weight"}
    assert all(torch.equal(arrived[name], state[name]) for name in unchanged)
    fresh = {name for name in checked.initialised if not name.startswith("pos_embed")}
    assert fresh == {n for n in STDiT(config).state_dict() if ".attn_temp." in n}


def test_pixart_alpha_starts_stdit2_with_a_longer_caption(official: Make, target: Make) -> None:
    config = architectures.STDiT2(**SMALL, model_max_length=200)
    state = pixart(120)
    checked = check(official(state), target(STDiT2(config), config))
    assert checked.report.fits, checked.report
    caption = dict(checked.tensors())["y_embedder.y_embedding"]
    assert torch.equal(caption, torch.cat([state["y_embedder.y_embedding"], caption[119:120].expand(80, -1)]))
    assert {"t_block_temp.1.weight", "rope.freqs", "fps_embedder.mlp.0.bias"} <= set(checked.initialised)


def test_multi_scale_embedders_are_used_where_there_are_some_and_dropped_elsewhere(
    official: Make, target: Make
) -> None:
    third, extra = WIDTH // 3, {}
    for name in ("csize_embedder", "ar_embedder"):
        extra |= {f"{name}.mlp.0.weight": (third, 256), f"{name}.mlp.2.weight": (third, third)}
        extra |= {f"{name}.mlp.0.bias": (third,), f"{name}.mlp.2.bias": (third,)}
    state = pixart(120, **extra)
    second, first = architectures.STDiT2(**SMALL), architectures.STDiT(**SMALL)
    used = check(official(state), target(STDiT2(second), second)).report
    assert set(extra) <= {entry.name for entry in used.having("used")}
    dropped = check(official(state), target(STDiT(first), first)).report
    assert dropped.fits
    assert {entry.name for entry in dropped.having("dropped")} == {"pos_embed", *extra}


def test_pixart_sigma_becomes_the_spatial_blocks_of_stdit3(official: Make, target: Make) -> None:
    config = architectures.STDiT3(**SMALL, model_max_length=310)
    state = pixart(300)
    checked = check(official(state), target(STDiT3(config), config))
    assert checked.report.fits, checked.report
    assert checked.report.source == "pixart_sigma"
    arrived = dict(checked.tensors())
    assert torch.equal(arrived["spatial_blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert arrived["y_embedder.y_embedding"].shape == (310, TEXT)
    fresh = {name.partition(".")[0] for name in checked.initialised}
    assert fresh == {"temporal_blocks", "fps_embedder", "rope", "spatial_blocks"}  # the last: q/k norms
    assert all("_norm" in n for n in checked.initialised if n.startswith("spatial_blocks"))


def test_pixart_sigma_starts_sixteen_channels_too(official: Make, target: Make) -> None:
    config = architectures.STDiT3(**SMALL, in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)
    checked = check(official(pixart(300)), target(STDiT3(config), config))
    assert checked.report.fits, checked.report
    assert checked.arrived["x_embedder.proj.weight"].how == "a time axis of 1, then 4 latent channels repeated to 16"


# --- 4 -> 16 channels ---------------------------------------------------------------------------------------------


def test_a_widened_network_gives_four_copies_of_the_answer(official: Make, target: Make) -> None:
    narrow, wide = (architectures.STDiT3(**SMALL, in_channels=c, input_sq_size=64) for c in (4, 16))
    source, network = randomised(STDiT3(narrow)), STDiT3(wide).eval()
    checked = check(official(source.state_dict()), target(network, wide), "opensora_4ch")
    assert checked.report.fits, checked.report
    network.load_state_dict(dict(checked.tensors()), strict=False)
    x, y = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 1, 300, TEXT)
    rest = {"timestep": torch.tensor([3.0, 700.0]), "y": y, "fps": torch.tensor([24.0, 24.0])}
    rest |= {"height": torch.tensor([32.0, 32.0]), "width": torch.tensor([32.0, 32.0])}
    with torch.inference_mode():
        small, large = source(x, **rest), network(x.repeat(1, 4, 1, 1, 1), **rest)
    mean, variance = small.chunk(2, dim=1)
    torch.testing.assert_close(large, torch.cat([mean.repeat(1, 4, 1, 1, 1), variance.repeat(1, 4, 1, 1, 1)], dim=1))


def test_the_rows_of_a_widened_final_layer_are_cells_halves_channels() -> None:
    rows = torch.arange(32.0)
    wide = widen({"final_layer.linear.bias": rows})["final_layer.linear.bias"].reshape(4, 2, 4, 4)
    for copy in range(4):
        assert torch.equal(wide[:, :, copy], rows.reshape(4, 2, 4))


def test_only_sixteen_channels_can_be_widened_to(official: Make, target: Make) -> None:
    config = architectures.STDiT3(**SMALL)
    network = STDiT3(config)
    with pytest.raises(OfficialError, match="gives 16 latent channels, mine has 4"):
        rules_for(official(network.state_dict()).headers, target(network, config), "opensora_4ch")


# --- MMDiT --------------------------------------------------------------------------------------------------------


def answer(network: nn.Module, **conditions: Tensor) -> Tensor:
    torch.manual_seed(3)
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).float()[None]
    inputs = (torch.randn(1, 8, 16), ids, torch.randn(1, 5, 20), torch.zeros(1, 5, 3), torch.tensor([0.3]))
    with torch.inference_mode():
        found: Tensor = network(*inputs, torch.randn(1, 12), **conditions)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_flux_weights_answer_the_same_in_every_layout(official: Make, target: Make, fused: bool, halves: bool) -> None:
    flux = architectures.MMDiT(**FLUX, fused_qkv=True, use_liger_rope=False, cond_embed=False)
    source = randomised(MMDiT(flux))
    guidance = {f"guidance_in.{n}": t for n, t in source.time_in.state_dict().items()}  # flux1-dev is distilled
    config = architectures.MMDiT(**FLUX, fused_qkv=fused, use_liger_rope=halves, cond_embed=False)
    network = MMDiT(config).eval()
    checked = check(official({**source.state_dict(), **guidance}), target(network, config), "auto")
    assert checked.report.fits, checked.report
    assert checked.report.source == "flux"
    assert {entry.name for entry in checked.report.having("dropped")} == set(guidance)
    network.load_state_dict(dict(checked.tensors()))
    torch.testing.assert_close(answer(network), answer(source))


def test_flux_weights_start_with_a_condition_of_zero(official: Make, target: Make) -> None:
    flux = architectures.MMDiT(**FLUX, fused_qkv=True, use_liger_rope=False, cond_embed=False)
    config = architectures.MMDiT(**FLUX, **RELEASED)
    checked = check(official(MMDiT(flux).state_dict()), target(MMDiT(config), config))
    assert checked.initialised == ("cond_in.weight", "cond_in.bias")
    split = checked.arrived["double_blocks.0.txt_attn.k_proj.bias"]
    assert split.sources == ("double_blocks.0.txt_attn.qkv.bias",)
    assert split.how == "q, k and v (and the MLP) split, then rotary pairs d, d+1 to halves"


def test_a_release_of_2_0_turns_to_pairs_for_a_network_without_halves(official: Make, target: Make) -> None:
    released = randomised(MMDiT(architectures.MMDiT(**FLUX, **RELEASED)))
    config = architectures.MMDiT(**{**FLUX, **RELEASED, "use_liger_rope": False})
    network = MMDiT(config).eval()
    network.load_state_dict(dict(check(official(released.state_dict()), target(network, config)).tensors()))
    cond = torch.zeros(1, 8, network.state_dict()["cond_in.weight"].shape[1])
    torch.testing.assert_close(answer(network, cond=cond), answer(released, cond=cond))


# --- autoencoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "spatial_vae.module."])
def test_attention_has_its_present_names(official: Make, target: Make, prefix: str) -> None:
    tiny: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    config = architectures.StableDiffusionNet(**tiny)
    if prefix:
        config = architectures.OpenSoraV12Net(**tiny, filters=8, num_res_blocks=1, num_groups=4)  # type: ignore[assignment]
    net = build_autoencoder(config).net
    state = net.state_dict()
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state.items():
        for new, before in renames.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    checked = check(official(old), target(net, config))
    assert checked.report.fits, checked.report
    assert checked.report.counts()["converted"] == 16
    assert all(tensor is state[name] for name, tensor in checked.tensors())
    entry = next(e for e in checked.report.entries if e.name == f"{prefix}encoder.mid_block.attentions.0.to_out.0.bias")
    assert entry.sources == (f"{prefix}encoder.mid_block.attentions.0.proj_attn.bias",)


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["flux", "opensora_4ch", "pixart_alpha"])
def test_a_source_that_starts_no_such_network_is_refused_with_those_that_do(
    official: Make, target: Make, source: Any
) -> None:
    second, flux = architectures.STDiT2(**SMALL), architectures.MMDiT(**FLUX, **RELEASED)
    network, config = (MMDiT(flux), flux) if source != "flux" else (STDiT2(second), second)
    takes = "opensora, flux" if source != "flux" else "opensora, pixart_alpha, pixart_sigma"
    with pytest.raises(OfficialError, match=f"source {source} starts no {config.kind}; mine takes {takes}"):
        check(official(network.state_dict()), target(network, config), source)
