"""The start of training: the picture made small and large again, whatever the random channels hold."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ml.models.autoencoders.hunyuan import HunyuanAutoencoder
from ml.models.autoencoders.opensora_v1_3 import OpenSoraV13Autoencoder
from ml.models.autoencoders.start import FIRST_LOGVAR

Fresh = HunyuanAutoencoder | OpenSoraV13Autoencoder


def _hunyuan(widths: tuple[int, int, int, int] = (8, 16, 32, 32)) -> HunyuanAutoencoder:
    return HunyuanAutoencoder(block_out_channels=widths, layers_per_block=1, norm_num_groups=1)


def _v1_3(ch: int = 8) -> OpenSoraV13Autoencoder:
    return OpenSoraV13Autoencoder(ch=ch, num_res_blocks=1, num_groups=1)


@pytest.fixture(params=[_hunyuan, _v1_3])
def fresh(request: pytest.FixtureRequest) -> Fresh:
    torch.manual_seed(0)
    build: Callable[[], Fresh] = request.param
    autoencoder = build().eval()
    autoencoder.initialise()
    return autoencoder


def picture(seed: int, frames: int = 1) -> torch.Tensor:
    """A smooth random picture [1,3,T,64,96] in [-1, 1] that stands still, the same in every run."""
    coarse = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, scale_factor=16, mode="bicubic")
    return (0.5 * smooth).clamp(-1, 1)[:, :, None].expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize("frames", [1, 5])
@torch.inference_mode()
def test_a_fresh_network_gives_back_the_blurred_picture(fresh: Fresh, frames: int) -> None:
    for seed in range(3):
        given = picture(seed, frames)
        rebuilt = fresh.decode(fresh.encode(given))
        blurred = F.interpolate(F.avg_pool2d(given[:, :, 0], 8), scale_factor=8, mode="bilinear")
        for frame in range(frames):
            flat = torch.stack([rebuilt[:, :, frame].flatten(), blurred.flatten()])
            assert torch.corrcoef(flat)[0, 1] > 0.95


@torch.inference_mode()
def test_it_is_nearer_to_the_video_than_the_mean_colour(fresh: Fresh) -> None:
    given = picture(0, 5)
    error = (fresh.decode(fresh.encode(given)) - given).square().mean()
    assert error < 0.3 * (given - given.mean(dim=(2, 3, 4), keepdim=True)).square().mean()


@torch.inference_mode()
def test_colours_stay_in_their_channels(fresh: Fresh) -> None:
    for colour in range(3):
        given = torch.zeros(1, 3, 1, 32, 32)
        given[:, colour, :, :, :16] = 1.0
        rebuilt = fresh.decode(fresh.encode(given))[0, :, 0]
        contrast = rebuilt[:, :, :8].mean(dim=(1, 2)) - rebuilt[:, :, -8:].mean(dim=(1, 2))
        assert int(contrast.abs().argmax()) == colour
        assert contrast[colour] > 0


@torch.inference_mode()
def test_a_cell_is_the_mean_of_its_own_pixels(fresh: Fresh) -> None:
    """A white cell on black: its latent stands out, and all others are alike but for the norms' small change."""
    given = -torch.ones(1, 3, 1, 40, 40)
    given[..., 16:24, 16:24] = 1.0
    red = fresh.encode(given)[0, 0, 0]
    others = torch.cat([red.flatten()[:12], red.flatten()[13:]])
    assert (red[2, 2] - others.mean()).abs() > 5 * others.std()


@torch.inference_mode()
def test_residual_branches_start_at_nothing(fresh: Fresh) -> None:
    state = fresh.net.state_dict()
    ends = [name for name in state if ".conv2.conv." in name or ".to_out.0." in name or ".proj_out." in name]
    ends += [name for name in state if name.endswith("conv3d.norm2.weight")]
    assert len(ends) > 20
    assert not any(state[name].any() for name in ends)


@torch.inference_mode()
def test_the_posterior_starts_almost_without_noise(fresh: Fresh) -> None:
    _, logvar = fresh.posterior(picture(0))
    torch.testing.assert_close(logvar, torch.full_like(logvar, FIRST_LOGVAR))


@pytest.mark.parametrize("build", [lambda: _hunyuan((4, 4, 4, 4)), lambda: _v1_3(ch=4)])
def test_too_few_channels_for_colours_start_random_and_finite(build: Callable[[], Fresh]) -> None:
    autoencoder = build()
    autoencoder.initialise()
    with torch.inference_mode():
        assert autoencoder.decode(autoencoder.encode(picture(0))).isfinite().all()


def test_nothing_is_drawn_on_the_meta_device() -> None:
    with torch.device("meta"):
        for autoencoder in (_hunyuan(), _v1_3()):
            autoencoder.initialise()
            assert all(parameter.is_meta for parameter in autoencoder.parameters())
