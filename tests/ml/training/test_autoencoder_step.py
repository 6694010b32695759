import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from ml.engines.plain import PlainEngine
from ml.models.autoencoders.autoencoder import Passed
from ml.reconstruction import Adversarial, AutoencoderLoss
from ml.training.autoencoder_step import Reconstruction, adaptive_weight, kl, last_layer, pictures
from ml.training.optim import step_generator
from ml.training.step import Loss, take_step

CPU = torch.device("cpu")
SMALL = Adversarial(weight=0.5, channels=4, layers=2, lr=1e-2)


class Dimmed(nn.Module):
    """Gives a video back 0.25 darker, with a posterior of mean 2 and variance 1/4, and inner latents 0.5 apart."""

    def __init__(self, inner: bool = True) -> None:
        super().__init__()
        self.by, self.inner = nn.Parameter(torch.tensor(0.25)), inner

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Passed:
        mean = torch.full((video.shape[0], 4, 2, 6, 10), 2.0)
        frames = torch.zeros(video.shape[0], 4, video.shape[2], 6, 10)
        pair = (frames, frames - 0.5) if self.inner else None
        return Passed(video - self.by, mean, torch.full_like(mean, math.log(0.25)), frames + 0.75, pair)


class Small(nn.Module):
    """Two convolutions: a posterior of four channels, and the pixels of its sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Passed:
        mean, logvar = self.encoder(video).chunk(2, 1)
        sample = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        return Passed(self.decoder(sample), mean, logvar, sample)


def engine_of(network: nn.Module) -> PlainEngine:
    engine = PlainEngine(CPU, torch.float32, 1.0)
    engine.setup(network, lambda p: SGD(p, lr=0.05), lambda o: LambdaLR(o, lambda _: 1.0))
    return engine


def small_engine() -> PlainEngine:
    torch.manual_seed(0)
    return engine_of(Small())


def clips(seed: int) -> Tensor:
    return torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def loss_of(section: AutoencoderLoss, perceptual: object = None, frames: int = 5, inner: bool = True) -> Loss:
    step = Reconstruction(section, perceptual)  # type: ignore[arg-type]
    video = torch.zeros(3, 3, frames, 48, 80)
    loss = step.loss(engine_of(Dimmed(inner)), video, step_generator(CPU, 0))
    assert (loss.examples, loss.tokens) == (3, 3 * 2 * 6 * 10)
    return loss


# --- the terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "variance", "wanted"), [(0, 1, 0), (2, 1, 2), (0, math.e**2, 0.5 * (math.e**2 - 3))])
def test_kl_is_the_closed_form_summed_over_a_clip(mean: float, variance: float, wanted: float) -> None:
    shape = (2, 3, 1, 5, 1)
    found = kl(torch.full(shape, float(mean)), torch.full(shape, math.log(variance)))
    assert float(found) == pytest.approx(15 * wanted, abs=1e-5)


def test_the_terms_are_weighted_and_added() -> None:
    divergence = 0.5 * (4 + 0.25 - 1 + math.log(4)) * (4 * 2 * 6 * 10) / (3 * 48 * 80)
    loss = loss_of(AutoencoderLoss(reconstruction=2.0, kl=0.1))
    assert float(loss.value.detach()) == pytest.approx(2 * 0.25 + 0.1 * divergence, rel=1e-6)
    assert loss.terms == pytest.approx({"reconstruction": 0.25, "kl": divergence}, rel=1e-6)

    def largest(left: Tensor, right: Tensor) -> Tensor:
        assert left.shape == right.shape == (15, 3, 48, 80)
        return (left - right).abs().amax((1, 2, 3))

    loss = loss_of(AutoencoderLoss(reconstruction=2.0, perceptual=0.5), largest)
    assert float(loss.value.detach()) == pytest.approx(2 * 0.25 + 0.5 * 0.25, rel=1e-6)


@pytest.mark.parametrize(("frames", "wanted"), [(5, 0.3 * 0.5), (1, 0.3 * 0.5 + 0.7 * 0.75)])
def test_identity_is_for_pictures_and_the_inner_latent_for_all(frames: int, wanted: float) -> None:
    loss = loss_of(AutoencoderLoss(reconstruction=0.0, identity=0.7, latent=0.3), frames=frames)
    assert float(loss.value.detach()) == pytest.approx(wanted, rel=1e-6)


def test_inner_terms_without_an_inner_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only OpenSora-VAE 1\.2 has"):
        loss_of(AutoencoderLoss(reconstruction=1.0, identity=1.0), inner=False)


def test_a_perceptual_weight_without_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an LPIPS network"):
        Reconstruction(AutoencoderLoss(reconstruction=1.0, perceptual=0.5, kl=0.0), None)


def test_frames_become_pictures_in_order() -> None:
    video = torch.arange(2 * 3 * 4).float().reshape(2, 1, 3, 2, 2).expand(2, 3, 3, 2, 2)
    assert torch.equal(pictures(video)[4], video[1, :, 1])


# --- the adversary ----------------------------------------------------------------------------------------------------


def test_the_adaptive_weight_makes_both_gradients_as_long() -> None:
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    others, adversarial = (layer * torch.tensor([6.0, 8.0])).sum(), (layer * torch.tensor([0.0, 2.0])).sum()
    assert float(adaptive_weight(others, adversarial, layer)) == pytest.approx(10 / (2 + 1e-4))
    assert float(adaptive_weight(others, 0 * adversarial, layer)) == 1e4


def test_the_last_layer_is_the_one_that_gives_the_pixels_or_the_last_that_trains() -> None:
    network = nn.ModuleDict({"decoder": nn.Conv3d(4, 3, 1), "quantise": nn.Conv3d(8, 8, 1), "head": nn.Linear(3, 3)})
    assert last_layer(network) is network["decoder"].weight
    network["decoder"].requires_grad_(False)
    assert last_layer(network) is network["quantise"].weight
    with pytest.raises(ValueError, match="none trains"):
        last_layer(nn.Linear(3, 3))


def test_loss_and_gradients_are_those_of_a_discriminator_in_the_graph() -> None:
    """Against the formulas written out with the discriminator left in the graph, and the hinge loss it learns from."""
    engine, section = small_engine(), AutoencoderLoss(reconstruction=1.0, kl=1e-3, adversarial=SMALL)
    objective = Reconstruction(section, None, seed=3)
    assert objective.adversary is not None
    judge = Reconstruction(section, None, seed=3).adversary
    assert judge is not None
    objective.begin(1)
    loss = objective.loss(engine, clips(1), torch.Generator().manual_seed(5))
    found = torch.autograd.grad(loss.value, list(engine.model.parameters()))

    passed = engine.model(clips(1), torch.Generator().manual_seed(5))
    pixels = (passed.video - clips(1)).abs().mean()
    fooled = -judge.network(passed.video).mean()
    layer = engine.model.get_parameter("decoder.weight")
    long, short = (torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (pixels, fooled))
    weight = 0.5 * float(long / (short + 1e-4))
    divergence = kl(passed.mean, passed.logvar) / (3 * 16 * 16)
    wanted = pixels + 1e-3 * divergence + weight * fooled
    assert float(loss.value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(wanted, list(engine.model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)

    with torch.no_grad():
        real, fake = judge.network(clips(1)), judge.network(passed.video)
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    assert loss.terms["adversarial_weight"] == pytest.approx(weight, rel=1e-5)
    assert loss.terms["discriminator"] == pytest.approx(float(hinge), rel=1e-5)


def test_a_fixed_weight_is_used_as_it_is() -> None:
    section = AutoencoderLoss(reconstruction=1.0, adversarial=SMALL.model_copy(update={"adaptive": False}))
    loss = Reconstruction(section, None).loss(small_engine(), clips(1), torch.Generator().manual_seed(5))
    assert loss.terms["adversarial_weight"] == 0.5
    wanted = loss.terms["reconstruction"] + 0.5 * loss.terms["adversarial"]
    assert float(loss.value.detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_adversary_waits_for_its_step_and_then_learns() -> None:
    section = AutoencoderLoss(reconstruction=1.0, adversarial=SMALL.model_copy(update={"start_step": 3}))
    engine, objective = small_engine(), Reconstruction(section, None)
    assert objective.adversary is not None
    first = {name: tensor.clone() for name, tensor in objective.adversary.network.state_dict().items()}
    for step in range(1, 4):
        objective.begin(step)
        report = take_step(engine, objective, [clips(step)], [torch.Generator().manual_seed(step)])
        now = objective.adversary.network.state_dict()
        assert ("adversarial" in report.terms) == (step == 3)
        assert all(torch.equal(first[name], now[name]) for name in first) == (step < 3)


def run(objective: Reconstruction, engine: PlainEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        objective.begin(step)
        torch.manual_seed(step)  # as the trainer does: dropout draws from the global generator
        losses.append(take_step(engine, objective, [clips(step)], [torch.Generator().manual_seed(step)]).loss)
    return losses


def test_a_resumed_adversary_goes_on_exactly(tmp_path: Path) -> None:
    section = AutoencoderLoss(reconstruction=1.0, adversarial=SMALL.model_copy(update={"dropout": 0.3}))
    engine, objective = small_engine(), Reconstruction(section, None, seed=1)
    run(objective, engine, range(1, 4))
    weights, moments = engine.gather(engine.masters()), copy.deepcopy(engine.moments())
    objective.save(tmp_path)
    wanted = run(objective, engine, range(4, 7))

    again, resumed = small_engine(), Reconstruction(section, None, seed=2)
    again.restore(weights, moments, 3)
    resumed.load(tmp_path)
    assert run(resumed, again, range(4, 7)) == wanted
    assert objective.adversary is not None
    assert resumed.adversary is not None
    one, other = objective.adversary.network.state_dict(), resumed.adversary.network.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
