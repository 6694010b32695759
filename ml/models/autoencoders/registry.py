"""Every autoencoder of the house by its kind: build, save and load, whatever the generation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from ml.architectures import AutoencoderNet, DCAENet, HunyuanNet, Latent, OpenSoraV12Net, StableDiffusionNet
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.dc_ae import DCAutoencoder
from ml.models.autoencoders.hunyuan import HunyuanAutoencoder
from ml.models.autoencoders.opensora_v1_2 import OpenSoraV12Autoencoder
from ml.models.autoencoders.opensora_v1_3 import OpenSoraV13Autoencoder
from ml.models.autoencoders.stable_diffusion import StableDiffusionAutoencoder
from ml.models.weights import Card, CheckpointMismatch, Origin, check_card, load_state, read_card, save_weights
from ml.sections import Autoencoder

NETS: TypeAdapter[AutoencoderNet] = TypeAdapter(AutoencoderNet)


def build_autoencoder(net: AutoencoderNet, latent: Latent | None = None) -> VideoAutoencoder:
    """The autoencoder of a section's `net`; a `latent` of None leaves raw latents as they are until it is measured.

    Weights are the network's own random ones; `initialise()` makes those to train a small one from.
    """
    latent = latent or Latent()
    if isinstance(net, StableDiffusionNet):
        return StableDiffusionAutoencoder(net, latent)
    if isinstance(net, OpenSoraV12Net):
        return OpenSoraV12Autoencoder(net, latent)
    if isinstance(net, HunyuanNet):
        return HunyuanAutoencoder(net, latent)
    return DCAutoencoder(net, latent) if isinstance(net, DCAENet) else OpenSoraV13Autoencoder(net, latent)


def save_autoencoder(
    folder: Path,
    autoencoder: VideoAutoencoder,
    net: AutoencoderNet,
    origin: Origin,
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the weights under the released names, with how latents are normalised in the card.

    `trained` (an EMA of the same names) takes the place of the network's own tensors.
    """
    state = {**autoencoder.net.state_dict(), **(trained or {})}
    save_weights(folder, state, _card(net, origin, autoencoder.latent))


def load_autoencoder(folder: Path, section: Autoencoder | None = None, recipe: str | None = None) -> VideoAutoencoder:
    """The autoencoder of a weights folder, with its latents normalised as they were measured.

    Raises CheckpointMismatch when it is no autoencoder, or not of the section and recipe id given.
    """
    card = read_card(folder)
    if card.latent is None:
        raise CheckpointMismatch(f"{folder} belongs to another network: kind is {card.kind!r}, which encodes nothing")
    latent = Latent.model_validate(card.latent)
    net = NETS.validate_python({"kind": card.kind, **card.config})
    if section is not None:
        # A card of before a hyper-parameter existed was written with its default.
        found = _card(net, card.origin, latent)
        check_card(folder, found, _card(section.net, Origin(recipe or card.origin.recipe, card.origin.stage), latent))
    autoencoder = build_autoencoder(net, latent)
    autoencoder.net.load_state_dict(load_state(folder))
    return autoencoder


def _card(net: AutoencoderNet, origin: Origin, latent: Latent) -> Card:
    config: dict[str, Any] = net.model_dump(mode="json", exclude={"kind"})
    return Card(net.kind, config, origin, latent.model_dump(mode="json"))
