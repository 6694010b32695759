"""What a recipe may say about the losses of an autoencoder: weights of the terms, and the adversary's own training."""

from typing import Annotated, Literal

from pydantic import Field

from ml.section import Fraction, Positive, PositiveFloat, Section

Weight = Annotated[float, Field(ge=0)]


class Adversarial(Section):
    """A discriminator against the autoencoder: a patch network in 3-D, trained beside it with AdamW.

    From `start_step` on (steps count from 1; 0 and 1 both mean from the first), the generator's term joins the loss and
    the discriminator learns. `weight` multiplies the term, after `adaptive` has scaled it so that its gradient at the
    decoder's last layer is as long as that of the pixel and perceptual terms (every version of Open-Sora does so).
    Defaults are 1.3's (cfg/vae_v1_3/train); Video DC-AE's are 5 layers, dropout 0.3, weight 0.05, rate 1e-4 and betas
    (0.9, 0.98) (cfg/vae/train/video_dc_ae_disc.py, main).
    """

    weight: PositiveFloat = 0.5
    start_step: Annotated[int, Field(ge=0)] = 0
    adaptive: bool = True
    loss: Literal["hinge"] = "hinge"
    layers: Positive = 3
    channels: Positive = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lr: PositiveFloat = 5e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: Weight = 0.0
    grad_clip: PositiveFloat = 1.0


class AutoencoderLoss(Section):
    """Weights of what an autoencoder minimises; a term of weight 0 is not computed.

    `reconstruction` is the mean L1 of the pixels, `perceptual` the mean LPIPS of the frames. `kl` weighs the divergence
    of a whole clip's posterior, divided by the values of one frame: the originals add up where this takes means, over
    a frame for the pixels and over the clip for the divergence, so that their weights (1e-6) hold here. The two of
    1.2's inner, temporal network: `latent` is the mean L1 between the per-frame latents and what comes back of them;
    `identity`, for single images only, that between the per-frame latent and the 3-D one.
    """

    reconstruction: Weight
    perceptual: Weight = 0.0
    kl: Weight = 0.0
    identity: Weight = 0.0
    latent: Weight = 0.0
    adversarial: Adversarial | None = None
