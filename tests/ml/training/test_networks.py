from pathlib import Path

import pytest
import torch

from ml.models.autoencoders.hunyuan import build_autoencoder, save_autoencoder
from ml.models.mmdit import save_mmdit
from ml.models.weights import CheckpointMismatch, Origin
from ml.recipe import Recipe
from ml.training.networks import measured_scale, new_transformer, open_autoencoder, open_transformer


def test_a_recipe_has_one_untrained_transformer(mini: Recipe) -> None:
    one, two = new_transformer(mini), open_transformer(mini, None)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in two.parameters())


def test_a_trained_transformer_is_opened_for_its_own_recipe_only(mini: Recipe, tmp_path: Path) -> None:
    network = new_transformer(mini)
    with torch.no_grad():
        network.img_in.bias.fill_(3.0)
    save_mmdit(tmp_path, network, Origin(mini.id, "stage1"))
    assert torch.equal(open_transformer(mini, tmp_path).img_in.bias, network.img_in.bias)
    with pytest.raises(CheckpointMismatch):
        open_transformer(mini.model_copy(update={"name": "v1_2"}), tmp_path)


def test_the_measured_scale_makes_latents_of_deviation_one(mini: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_autoencoder(mini.autoencoder).eval()
    videos = [torch.rand(2, 3, 5, 48, 80) * 2 - 1 for _ in range(3)]
    network.scale = measured_scale(network, videos)
    with torch.no_grad():
        latents = torch.cat([network.encode(video) for video in videos])
    assert float(latents.std()) == pytest.approx(1.0, abs=1e-3)
    save_autoencoder(tmp_path, network, Origin(mini.id, "vae_stage1"))
    assert open_autoencoder(mini, tmp_path).scale == network.scale


@torch.no_grad()
def test_an_opened_autoencoder_tiles_what_is_large_and_nothing_else(mini: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = build_autoencoder(mini.autoencoder).eval()
    save_autoencoder(tmp_path, plain, Origin(mini.id, "vae_stage1"))
    opened = open_autoencoder(mini, tmp_path)
    opened.scale = plain.scale = 1.0
    for shape, same in (((33, 48, 80), True), ((17, 64, 128), True), ((1, 32, 320), False), ((81, 16, 16), False)):
        video = torch.rand(1, 3, *shape) * 2 - 1
        latent, tiled = plain.encode(video), opened.encode(video)
        assert (torch.equal(latent, tiled), latent.shape) == (same, tiled.shape)
        rebuilt = opened.decode(latent)
        assert (torch.equal(plain.decode(latent), rebuilt), rebuilt.shape) == (same, video.shape)
