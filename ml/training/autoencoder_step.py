"""What a training step of an autoencoder minimises: pixels, perception, divergence, inner latents, and an adversary.

Letters: B batch, T frames, H W pixels, C latent channels, t h w latent grid. The original adds up where this takes
means (`ml/reconstruction.py`): its loss is this one times the 3HW values of a frame, whatever the weights.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ml.engines.protocol import Engine
from ml.models.autoencoders.autoencoder import Passed
from ml.models.discriminator import generator_hinge
from ml.reconstruction import AutoencoderLoss
from ml.training.adversary import Adversary
from ml.training.step import Loss, Objective

Perceptual = Callable[[Tensor, Tensor], Tensor]

# The adaptive weight is |other gradient| / (|adversarial gradient| + 1e-4), at most 1e4 (om/vae/losses.py, 1.2).
ADAPTIVE_EPS, ADAPTIVE_MOST = 1e-4, 1e4
CONVOLUTION_DIMS, RGB = 4, 3


class Reconstruction(Objective[Tensor]):
    """Weighted sum of the terms; `perceptual` takes two batches of pictures [N,3,H,W] and gives distances [N].

    The discriminator of the adversarial term is drawn from `seed`, and learns from every batch right after the term
    was computed of it. `last` holds the terms of the newest batch before their weights, for logs. Raises ValueError
    when the recipe weighs a perceptual term and there is no network for it.
    """

    def __init__(self, section: AutoencoderLoss, perceptual: Perceptual | None, seed: int = 0) -> None:
        if section.perceptual > 0 and perceptual is None:
            raise ValueError("loss.perceptual is above 0, which needs an LPIPS network: give one, or set it to 0")
        self.section, self.perceptual = section, perceptual
        self.adversary = Adversary(section.adversarial, seed) if section.adversarial else None
        self.step, self.last = 0, dict[str, float]()

    def begin(self, step: int) -> None:
        """Say which step (from 1) the next batches belong to; the adversarial term waits for its first."""
        self.step = step

    def loss(self, engine: Engine, data: Tensor, generator: torch.Generator) -> Loss:
        """Loss of a video batch [B,3,T,H,W] in [-1, 1]; tokens are latent positions."""
        video = data.to(engine.device, engine.dtype)
        passed: Passed = engine.model(video, generator)
        terms = self._terms(passed, video)
        value = _total(self.section, terms, passed.video)
        self.last = {name: float(term.detach()) for name, term in terms.items()}
        if self.adversary is not None and self.step >= self.adversary.section.start_step:
            looks = {name: term for name, term in terms.items() if name in ("reconstruction", "perceptual")}
            others = _total(self.section, looks, passed.video)
            value = value + self._adversarial(engine, self.adversary, (video, passed.video), others)
        return Loss(value, len(video), passed.mean.numel() // passed.mean.shape[1], self.last)

    def save(self, folder: Path) -> None:
        """Write the adversary, if there is one, into the folder of a checkpoint."""
        if self.adversary is not None:
            self.adversary.save(folder)

    def load(self, folder: Path) -> None:
        """Take the adversary back as it was; raises AdversaryError when it is missing or another one."""
        if self.adversary is not None:
            self.adversary.load(folder)

    def _terms(self, passed: Passed, video: Tensor) -> dict[str, Tensor]:
        """Every term that has a weight, by its name in the section; the network needs what they speak of."""
        section, terms = self.section, dict[str, Tensor]()
        if section.reconstruction > 0:
            terms["reconstruction"] = (passed.video - video).abs().float().mean()
        if self.perceptual is not None and section.perceptual > 0:
            terms["perceptual"] = self.perceptual(pictures(passed.video).float(), pictures(video).float()).mean()
        if section.kl > 0 and passed.logvar is not None:
            terms["kl"] = kl(passed.mean.float(), passed.logvar.float()) / video[0, :, 0].numel()
        if section.latent > 0 or section.identity > 0:
            if passed.inner is None:
                raise ValueError(
                    "loss.latent and loss.identity compare the latents of a network inside another, which only "
                    "OpenSora-VAE 1.2 has, and not while its spatial part trains: set both to 0"
                )
            frames, back = passed.inner
            if section.latent > 0:
                terms["latent"] = (back - frames).abs().float().mean()
            if section.identity > 0 and video.shape[2] == 1:
                terms["identity"] = (passed.sample - frames).abs().float().mean()
        return terms

    def _adversarial(
        self, engine: Engine, adversary: Adversary, videos: tuple[Tensor, Tensor], others: Tensor
    ) -> Tensor:
        """The weighted term of a (real, rebuilt) pair, after which the discriminator has learned from the pair.

        Its gradient is taken down to the rebuilt video at once and carried on from there by a product with it: the
        discriminator's weights may then change before the loss goes backward.
        """
        real, rebuilt = videos
        seen = rebuilt.detach().float().requires_grad_()
        term = generator_hinge(adversary.judge(seen))
        (pull,) = torch.autograd.grad(term, seen)
        carried = (rebuilt.float() * pull).sum()
        weight = torch.tensor(adversary.section.weight, device=carried.device)
        if adversary.section.adaptive:
            weight = weight * adaptive_weight(others, carried, last_layer(engine.model))
        self.last["adversarial"], self.last["adversarial_weight"] = float(term.detach()), float(weight)
        self.last["discriminator"] = adversary.learn(real.float(), seen.detach(), engine)
        return weight * (carried - carried.detach() + term.detach())


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence from the standard normal, 0.5 (mean^2 + var - 1 - log var), summed per clip; the mean of clips."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def adaptive_weight(others: Tensor, adversarial: Tensor, layer: nn.Parameter) -> Tensor:
    """How many times longer the gradient of the other terms is at the last layer than the adversarial term's."""
    lengths = [torch.autograd.grad(term, layer, retain_graph=True)[0].float().norm() for term in (others, adversarial)]
    ratio: Tensor = lengths[0] / (lengths[1] + ADAPTIVE_EPS)
    return ratio.clamp(0, ADAPTIVE_MOST).detach()


def last_layer(network: nn.Module) -> nn.Parameter:
    """The convolution that gives the pixels, or where it does not train, the last one that does.

    Networks register their decoders last, so that it is the last that gives three channels. Raises ValueError when no
    convolution trains.
    """
    trained = [p for p in network.parameters() if p.requires_grad and p.dim() >= CONVOLUTION_DIMS]
    if not trained:
        raise ValueError("the adaptive adversarial weight is taken at the last convolution, and none trains here")
    return next((p for p in reversed(trained) if p.shape[0] == RGB), trained[-1])


def pictures(video: Tensor) -> Tensor:
    """Frames of a video as a batch of pictures: [B,3,T,H,W] -> [B T,3,H,W]."""
    return video.transpose(1, 2).flatten(0, 1)


def _total(section: AutoencoderLoss, terms: dict[str, Tensor], video: Tensor) -> Tensor:
    """Weighted sum of terms; 0 that a gradient can be taken of when there are none."""
    weights = section.model_dump()
    total = 0.0 * video.float().sum()
    for name, term in terms.items():
        total = total + weights[name] * term
    return total
