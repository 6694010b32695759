from pathlib import Path
from typing import Any

import pytest
import torch

from ml.architectures import Latent
from ml.models.autoencoders.registry import build_autoencoder, save_autoencoder
from ml.models.networks import save_network
from ml.models.weights import CheckpointMismatch, Origin
from ml.recipe import Recipe
from ml.training.networks import PER_CHANNEL, measured_latent, new_transformer, open_autoencoder, open_transformer


def test_a_recipe_has_one_untrained_transformer(mini: Recipe) -> None:
    one, two = new_transformer(mini), open_transformer(mini, None)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in two.parameters())


def test_a_trained_transformer_is_opened_for_its_own_recipe_only(mini: Recipe, tmp_path: Path) -> None:
    network = new_transformer(mini)
    with torch.no_grad():
        network.img_in.bias.fill_(3.0)
    save_network(tmp_path, network, Origin(mini.id, "stage1"))
    assert torch.equal(open_transformer(mini, tmp_path).img_in.bias, network.img_in.bias)
    with pytest.raises(CheckpointMismatch):
        open_transformer(mini.model_copy(update={"name": "v1_2"}), tmp_path)


def test_the_measured_scale_makes_latents_of_deviation_one(mini: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_autoencoder(mini.autoencoder.net).eval()
    videos = [torch.rand(2, 3, 5, 48, 80) * 2 - 1 for _ in range(3)]
    network.latent = measured_latent(network, mini.autoencoder.kind, videos)
    assert network.latent.mean == network.latent.std == ()
    with torch.no_grad():
        latents = torch.cat([network.encode(video) for video in videos])
    assert float(latents.std()) == pytest.approx(1.0, abs=1e-3)
    save_autoencoder(tmp_path, network, mini.autoencoder.net, Origin(mini.id, "vae_stage1"))
    assert open_autoencoder(mini, tmp_path).latent == network.latent


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1_2", "v1_3"])
def test_channels_of_1_2_and_1_3_are_measured_one_by_one(make_generation: Any, name: str) -> None:
    """Mean 0 and deviation 1 in every channel, over batches of other sizes too."""
    recipe = make_generation(name)
    assert recipe.autoencoder.kind in PER_CHANNEL
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder.net).eval()
    frames = recipe.sampling.frames
    videos = [torch.rand(count, 3, frames, 48, 80) * 2 - 1 for count in (2, 1)]
    network.latent = measured_latent(network, recipe.autoencoder.kind, videos)
    latents = torch.cat([network.encode(video) for video in videos]).transpose(0, 1).flatten(1)
    assert latents.mean(1).tolist() == pytest.approx([0.0] * recipe.autoencoder.latent_channels, abs=1e-3)
    assert latents.std(1).tolist() == pytest.approx([1.0] * recipe.autoencoder.latent_channels, abs=1e-2)
    assert network.latent.scale == 1.0


@torch.no_grad()
def test_one_number_for_all_channels_is_stable_diffusions_rule(make_generation: Any) -> None:
    """1 / deviation of all raw latents together, and their mean stays where it is."""
    recipe = make_generation("v1_0")
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder.net).eval()
    videos = [torch.rand(2, 3, 2, 48, 80) * 2 - 1 for _ in range(2)]
    raw = torch.cat([network.posterior(video)[0] for video in videos])
    found = measured_latent(network, "sd", videos)
    assert found.scale == pytest.approx(1 / float(raw.double().std(correction=0)), rel=1e-6)
    assert found == Latent(scale=found.scale)


@torch.no_grad()
def test_an_opened_autoencoder_tiles_large_planes_and_no_long_clips(mini: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = build_autoencoder(mini.autoencoder.net).eval()
    save_autoencoder(tmp_path, plain, mini.autoencoder.net, Origin(mini.id, "vae_stage1"))
    opened = open_autoencoder(mini, tmp_path)
    for shape, same in (((33, 48, 80), True), ((17, 64, 128), True), ((1, 32, 320), False), ((81, 16, 16), True)):
        video = torch.rand(1, 3, *shape) * 2 - 1
        latent, tiled = plain.encode(video), opened.encode(video)
        assert (torch.equal(latent, tiled), latent.shape) == (same, tiled.shape)
        rebuilt = opened.decode(latent)
        assert (torch.equal(plain.decode(latent), rebuilt), rebuilt.shape) == (same, video.shape)
