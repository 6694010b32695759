"""The base of every autoencoder, on one whose arithmetic can be done by hand."""

import pytest
import torch
from torch import Tensor, nn

from ml.architectures import Latent
from ml.models.autoencoders.autoencoder import Part, VideoAutoencoder, draw


class Blocks(VideoAutoencoder):
    """A latent cell is the mean of 2 frames x 4 x 4 pixels; its fourth channel is the mean of the other three."""

    def __init__(self, latent: Latent | None = None) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.latent = latent or Latent()
        self.latent_channels, self.temporal_stride, self.spatial_stride = 4, 2, 4

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        mean = nn.functional.avg_pool3d(video, (2, 4, 4))
        mean = torch.cat([mean, mean.mean(1, keepdim=True)], 1)
        return mean, torch.full_like(mean, -2.0)

    def rebuild(self, z: Tensor, frames: int) -> Tensor:
        return nn.functional.interpolate(z[:, :3], scale_factor=(2, 4, 4))[:, :, :frames]

    def latent_frames(self, frames: int) -> int:
        if frames % 2:
            raise ValueError(f"{frames} frames cannot be encoded")
        return frames // 2

    def tile(self, enabled: bool) -> None:
        return

    def initialise(self) -> None:
        return

    def train_only(self, part: Part) -> None:
        return


VIDEO = torch.rand(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
LATENT = Latent(scale=3.0, mean=(0.1, -0.2, 0.3, 0.0), std=(2.0, 0.5, 1.0, 4.0))


def test_latents_are_normalised_channel_by_channel() -> None:
    raw, normalised = Blocks().encode(VIDEO), Blocks(LATENT).encode(VIDEO)
    assert normalised.shape == (2, 4, 2, 2, 3)
    for channel, (mean, std) in enumerate(zip(LATENT.mean, LATENT.std, strict=True)):
        torch.testing.assert_close(normalised[:, channel], (raw[:, channel] - mean) / std * 3.0)


@pytest.mark.parametrize("latent", [Latent(), Latent(scale=0.18215), LATENT])
def test_decoding_undoes_the_normalisation(latent: Latent) -> None:
    autoencoder = Blocks(latent)
    wanted = nn.functional.interpolate(nn.functional.avg_pool3d(VIDEO, (2, 4, 4)), scale_factor=(2, 4, 4))
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(VIDEO)), wanted)
    assert autoencoder.decode(autoencoder.encode(VIDEO), 3).shape[2] == 3


def test_normalisation_keeps_the_dtype_of_the_video() -> None:
    assert Blocks(LATENT).encode(VIDEO.double()).dtype == torch.float64
    assert Blocks(LATENT).decode(Blocks(LATENT).encode(VIDEO.double())).dtype == torch.float64


def test_the_longest_clip_of_a_latent_is_one_that_can_be_encoded() -> None:
    assert [Blocks().longest(latents) for latents in (1, 2, 5)] == [2, 4, 10]
    with pytest.raises(ValueError, match="cannot decode 0 latent frames: no clip has so many"):
        Blocks().longest(0)


def test_a_file_under_released_names_is_that_of_the_net() -> None:
    """Alone and inside another module, strictly; names that begin with `net.` stay as they are."""
    one, other = Blocks(), nn.ModuleDict({"inner": Blocks()})
    one.net = nn.Linear(2, 2)
    other["inner"].net = nn.Linear(2, 2)
    released = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    one.load_state_dict(released, strict=True)
    other.load_state_dict({f"inner.{name}": value for name, value in released.items()}, strict=True)
    assert one.state_dict().keys() == {"net.weight", "net.bias"}
    one.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one.net.weight, released["weight"])
    assert torch.equal(other["inner"].net.weight, released["weight"])
    with pytest.raises(RuntimeError, match=r"net\.bias"):
        one.load_state_dict({"weight": torch.ones(2, 2)}, strict=True)


def test_the_shape_of_a_latent_is_known_before_it_is_made() -> None:
    assert Blocks().latent_shape(4, 8, 12) == Blocks().encode(VIDEO)[0].shape
    with pytest.raises(ValueError, match="height and width must be multiples of 4"):
        Blocks().latent_shape(4, 8, 10)
    with pytest.raises(ValueError, match="3 frames cannot be encoded"):
        Blocks().latent_shape(3, 8, 12)


def test_a_training_pass_decodes_a_sample_of_the_posterior() -> None:
    autoencoder = Blocks(LATENT)
    one, again = (autoencoder(VIDEO, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.sample, again.sample)
    assert torch.equal(one.mean, autoencoder.posterior(VIDEO)[0])
    torch.testing.assert_close(one.video, autoencoder.rebuild(one.sample, 4))
    assert one.inner is None
    other = autoencoder(VIDEO, torch.Generator().manual_seed(6))
    assert not torch.equal(other.sample, one.sample)


def test_a_posterior_sample_has_its_mean_and_deviation() -> None:
    """Mean 2, variance 1/4, 40,000 draws: +- 0.0025 on the mean."""
    mean, logvar = torch.full((40000,), 2.0), torch.full((40000,), -1.3862944)
    found = draw(mean, logvar, torch.Generator().manual_seed(0))
    assert float(found.mean()) == pytest.approx(2.0, abs=0.01)
    assert float(found.std()) == pytest.approx(0.5, rel=0.02)
    assert draw(mean, None, None) is mean
