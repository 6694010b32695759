"""Every autoencoder by its kind: built, written under released names, read back, refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ml.architectures import DCAENet, HunyuanNet, Latent, OpenSoraV12Net, OpenSoraV13Net, StableDiffusionNet
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.weights import WEIGHTS, Card, CheckpointMismatch, Origin, read_card, save_weights
from ml.recipe import Recipe
from ml.sections import GEOMETRY, Autoencoder
from ml.shapes import Strides

SMALL: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}
NETS: dict[str, Any] = {
    "sd": StableDiffusionNet(**SMALL),
    "opensora_v1_2": OpenSoraV12Net(
        **SMALL, filters=8, num_res_blocks=1, channel_multipliers=(1, 1, 1, 1), num_groups=1
    ),
    "opensora_v1_3": OpenSoraV13Net(latent_channels=4, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, num_groups=1),
    "hunyuan": HunyuanNet(**SMALL, latent_channels=4),
    "dc_ae": DCAENet(
        latent_channels=8,
        widths=(8, 8, 8, 8, 8, 8),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        attention_head_dim=8,
    ),
}
# A clip of every kind's own length, and how long its latent is.
LENGTHS = {"sd": 3, "opensora_v1_2": 8, "opensora_v1_3": 5, "hunyuan": 5, "dc_ae": 8}
LATENT = Latent(scale=2.0)


def section(kind: str, **over: Any) -> Autoencoder:
    return Autoencoder(net=NETS[kind].model_copy(update=over), latent=LATENT, weights_uri="w", stages=())


def video(kind: str) -> torch.Tensor:
    return torch.rand(1, 3, LENGTHS[kind], 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_kind_of_a_recipe_has_a_geometry_and_a_network() -> None:
    assert set(NETS) == set(GEOMETRY)


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
def test_a_network_shortens_time_and_space_as_the_recipe_reckons(kind: str) -> None:
    torch.manual_seed(0)
    autoencoder, recipe = build_autoencoder(NETS[kind], LATENT).eval(), section(kind)
    strides = Strides(recipe.law, recipe.spatial_stride, patch=1)
    clip = video(kind)
    latent = autoencoder.encode(clip)
    assert latent.shape[1:] == (
        recipe.latent_channels,
        strides.latent_frames(LENGTHS[kind]),
        *[64 // strides.spatial] * 2,
    )
    assert latent.shape[1:] == autoencoder.latent_shape(LENGTHS[kind], 64, 64)
    assert autoencoder.decode(latent, LENGTHS[kind]).shape == clip.shape
    for frames in range(1, 40):
        if strides.encodes(frames):
            assert autoencoder.latent_frames(frames) == strides.latent_frames(frames)
    assert (autoencoder.temporal_stride, autoencoder.spatial_stride) == (strides.temporal, strides.spatial)


@torch.no_grad()
@pytest.mark.parametrize("kind", NETS)
def test_what_is_written_encodes_the_same_when_read_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(NETS[kind], LATENT).eval()
    save_autoencoder(tmp_path, autoencoder, NETS[kind], Origin("v0-tiny", "vae"))
    other = load_autoencoder(tmp_path, section(kind), "v0-tiny").eval()
    assert other.latent == LATENT
    assert torch.equal(other.encode(video(kind)), autoencoder.encode(video(kind)))
    card = read_card(tmp_path)
    assert (card.kind, card.origin, card.latent) == (kind, Origin("v0-tiny", "vae"), LATENT.model_dump(mode="json"))
    assert type(load_autoencoder(tmp_path)) is type(autoencoder), "the card alone is enough"


@pytest.mark.parametrize("kind", NETS)
def test_weights_stand_under_the_released_names(kind: str, tmp_path: Path) -> None:
    autoencoder = build_autoencoder(NETS[kind], LATENT)
    save_autoencoder(tmp_path, autoencoder, NETS[kind], Origin("v0-tiny", "vae"))
    names = load_file(tmp_path / WEIGHTS).keys()
    assert names == autoencoder.net.state_dict().keys()
    assert not any(name.startswith("net.") for name in names)


def test_an_average_takes_the_place_of_the_weights(tmp_path: Path) -> None:
    autoencoder = build_autoencoder(NETS["sd"], LATENT)
    name = next(iter(dict(autoencoder.net.named_parameters())))
    average = {name: torch.full_like(autoencoder.net.get_parameter(name), 7.0)}
    save_autoencoder(tmp_path, autoencoder, NETS["sd"], Origin("v0-tiny", "vae"), average)
    written = load_file(tmp_path / WEIGHTS)
    assert bool((written[name] == 7).all())
    assert all(torch.equal(written[n], t) for n, t in autoencoder.net.state_dict().items() if n != name)


def test_an_autoencoder_of_another_recipe_or_net_is_refused(tmp_path: Path) -> None:
    save_autoencoder(tmp_path, build_autoencoder(NETS["sd"], LATENT), NETS["sd"], Origin("v0-tiny", "vae"))
    with pytest.raises(CheckpointMismatch, match="recipe is 'v0-tiny', wanted 'v1_0-tiny'"):
        load_autoencoder(tmp_path, section("sd"), "v1_0-tiny")
    with pytest.raises(CheckpointMismatch, match="config layers_per_block is 1, wanted 2"):
        load_autoencoder(tmp_path, section("sd", layers_per_block=2), "v0-tiny")
    with pytest.raises(CheckpointMismatch, match="kind is 'sd', wanted 'hunyuan'"):
        load_autoencoder(tmp_path, section("hunyuan"), "v0-tiny")
    assert load_autoencoder(tmp_path, section("sd")).latent == LATENT, "without a recipe id any recipe's will do"


def test_a_card_of_before_a_hyper_parameter_has_its_default(tmp_path: Path) -> None:
    autoencoder = build_autoencoder(NETS["hunyuan"], LATENT)
    before = {name: value for name, value in NETS["hunyuan"].model_dump().items() if "tiling" not in name}
    before.pop("kind")
    card = Card("hunyuan", before, Origin("v0-tiny", "autoencoder"), LATENT.model_dump())
    save_weights(tmp_path, autoencoder.net.state_dict(), card)
    load_autoencoder(tmp_path, section("hunyuan"), "v0-tiny")
    with pytest.raises(CheckpointMismatch, match="config use_temporal_tiling is False, wanted True"):
        load_autoencoder(tmp_path, section("hunyuan", use_temporal_tiling=True), "v0-tiny")


def test_a_transformer_encodes_nothing(tmp_path: Path) -> None:
    save_weights(tmp_path, {"w": torch.zeros(1)}, Card("mmdit", {}, Origin("v2_0-tiny", "stage1")))
    with pytest.raises(CheckpointMismatch, match="'mmdit', which encodes nothing"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", ["v1_0", "v1_1", "v1_2", "v1_3", "v2_0", "v2_0_hc"])
def test_the_published_autoencoder_of_every_recipe_is_built(name: str) -> None:
    recipe = Recipe.load(name, "paper").autoencoder
    with torch.device("meta"):
        autoencoder = build_autoencoder(recipe.net, recipe.latent)
    assert autoencoder.latent == recipe.latent
    millions = sum(parameter.numel() for parameter in autoencoder.net.parameters()) / 1e6
    assert 80 < millions < 700
