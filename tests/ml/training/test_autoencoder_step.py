import math

import pytest
import torch
from torch import Tensor, nn

from ml.engines.plain import PlainEngine
from ml.sections import Adam, AutoencoderLoss
from ml.training.autoencoder_step import Reconstruction, kl, pictures
from ml.training.optim import adamw, step_generator, warm_up

ADAM = Adam(lr=0.1, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
CPU = torch.device("cpu")


class Dimmed(nn.Module):
    """Gives a video back 0.25 darker, with a posterior of mean 2 and variance 1/4."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.25))

    def forward(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        mean = torch.full((video.shape[0], 4, 2, 6, 10), 2.0)
        return video - self.by, mean, torch.full_like(mean, math.log(0.25))


def loss_of(section: AutoencoderLoss, perceptual: object = None) -> float:
    engine = PlainEngine(CPU, torch.float32, 1.0)
    engine.setup(Dimmed(), adamw(ADAM), warm_up(ADAM))
    step = Reconstruction(section, perceptual)  # type: ignore[arg-type]
    loss = step.loss(engine, torch.zeros(3, 3, 5, 48, 80), step_generator(CPU, 0))
    assert (loss.examples, loss.tokens) == (3, 3 * 2 * 6 * 10)
    return float(loss.value.detach())


@pytest.mark.parametrize(("mean", "variance", "wanted"), [(0, 1, 0), (2, 1, 2), (0, math.e**2, 0.5 * (math.e**2 - 3))])
def test_kl_is_the_closed_form(mean: float, variance: float, wanted: float) -> None:
    shape = (2, 3)
    found = kl(torch.full(shape, float(mean)), torch.full(shape, math.log(variance)))
    assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_the_terms_are_weighted_and_added() -> None:
    divergence = 0.5 * (4 + 0.25 - 1 + math.log(4))
    section = AutoencoderLoss(reconstruction=2.0, perceptual=0.0, kl=0.1)
    assert loss_of(section) == pytest.approx(2 * 0.25 + 0.1 * divergence, rel=1e-6)

    def largest(left: Tensor, right: Tensor) -> Tensor:
        assert left.shape == right.shape == (15, 3, 48, 80)
        return (left - right).abs().amax((1, 2, 3))

    section = AutoencoderLoss(reconstruction=2.0, perceptual=0.5, kl=0.0)
    assert loss_of(section, largest) == pytest.approx(2 * 0.25 + 0.5 * 0.25, rel=1e-6)


def test_a_perceptual_weight_without_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an LPIPS network"):
        Reconstruction(AutoencoderLoss(reconstruction=1.0, perceptual=0.5, kl=0.0), None)


def test_frames_become_pictures_in_order() -> None:
    video = torch.arange(2 * 3 * 4).float().reshape(2, 1, 3, 2, 2).expand(2, 3, 3, 2, 2)
    assert torch.equal(pictures(video)[4], video[1, :, 1])
