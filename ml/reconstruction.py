"""What a recipe may say about the losses of an autoencoder: weights of the terms, and the adversary's own training."""

from typing import Annotated, Literal

from pydantic import Field

from ml.section import Fraction, Positive, PositiveFloat, Section

Weight = Annotated[float, Field(ge=0)]


class Adversarial(Section):
    """A discriminator against the autoencoder: a patch network in 3-D, trained beside it with AdamW.

    From `start_step` on (steps count from 1; 0 and 1 both mean from the first), the generator's term joins the loss and
    the discriminator learns. `weight` multiplies the term, after `adaptive` has scaled it so that its gradient at the
    decoder's last layer is as long as that of the other terms (Open-Sora's own way, every version). Defaults: 1.3
    (cfg/vae_v1_3/train, three layers, 0.5); Video DC-AE has five layers, 0.05 and a rate of 1e-4.
    """

    weight: PositiveFloat = 0.5
    start_step: Annotated[int, Field(ge=0)] = 0
    adaptive: bool = True
    loss: Literal["hinge"] = "hinge"
    layers: Positive = 3
    channels: Positive = 64
    lr: PositiveFloat = 5e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Weight = 0.0
    grad_clip: PositiveFloat = 1.0


class AutoencoderLoss(Section):
    """Weights of what an autoencoder minimises; a term of weight 0 is not computed.

    `reconstruction` is L1 of the pixels, `perceptual` LPIPS of the frames, `kl` the posterior's divergence. The two of
    1.2's inner, temporal network: `latent` is L1 between the per-frame latents and what comes back of them, for clips;
    `identity` is the same for single images, whose 3-D latent should be the 2-D one.
    """

    reconstruction: Weight
    perceptual: Weight = 0.0
    kl: Weight = 0.0
    identity: Weight = 0.0
    latent: Weight = 0.0
    adversarial: Adversarial | None = None
