"""The start of training: a linear picture made small and large again, whatever the random channels hold."""

import pytest
import torch
import torch.nn.functional as F

from ml.models.autoencoders.hunyuan import VideoAutoencoder, build_autoencoder
from ml.models.autoencoders.start import FIRST_LOGVAR
from ml.recipe import Recipe


@pytest.fixture
def fresh(tiny_recipe: Recipe) -> VideoAutoencoder:
    torch.manual_seed(0)
    return build_autoencoder(tiny_recipe.autoencoder).eval()


def picture(seed: int) -> torch.Tensor:
    """A smooth random picture [1,3,1,64,96] in [-1, 1], the same in every run."""
    coarse = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, scale_factor=16, mode="bicubic")
    return (0.5 * smooth).clamp(-1, 1)[:, :, None]


@torch.inference_mode()
def test_a_fresh_network_gives_back_the_blurred_picture(fresh: VideoAutoencoder) -> None:
    for seed in range(3):
        given = picture(seed)
        rebuilt = fresh.decode(fresh.encode(given))
        blurred = F.interpolate(F.avg_pool2d(given[:, :, 0], 8), scale_factor=8, mode="bilinear")
        flat = torch.stack([rebuilt[:, :, 0].flatten(), blurred.flatten()])
        assert torch.corrcoef(flat)[0, 1] > 0.85


@torch.inference_mode()
def test_colours_stay_in_their_channels(fresh: VideoAutoencoder) -> None:
    for colour in range(3):
        given = torch.zeros(1, 3, 1, 32, 32)
        given[:, colour, :, :, :16] = 1.0
        rebuilt = fresh.decode(fresh.encode(given))[0, :, 0]
        contrast = rebuilt[:, :, :8].mean(dim=(1, 2)) - rebuilt[:, :, -8:].mean(dim=(1, 2))
        assert int(contrast.abs().argmax()) == colour


@torch.inference_mode()
def test_residual_branches_start_at_nothing(fresh: VideoAutoencoder) -> None:
    state = fresh.net.state_dict()
    ends = [name for name in state if ".conv2.conv." in name or ".to_out.0." in name]
    assert {name.rpartition(".")[2] for name in ends if "to_out" in name} == {"weight", "bias"}
    assert not any(state[name].any() for name in ends)


@torch.inference_mode()
def test_the_posterior_starts_almost_without_noise(fresh: VideoAutoencoder) -> None:
    _, logvar = fresh.posterior(picture(0))
    torch.testing.assert_close(logvar, torch.full_like(logvar, FIRST_LOGVAR))
