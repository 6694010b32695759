"""Every transformer of the house by its kind: build, save and load, whatever the generation."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ml.architectures import MMDiT as MMDiTSection
from ml.architectures import Model
from ml.architectures import STDiT as STDiTSection
from ml.architectures import STDiT2 as STDiT2Section
from ml.models.mmdit import MMDiT
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3
from ml.models.weights import Card, Origin, check_card, load_state, read_card, save_weights

Network = STDiT | STDiT2 | STDiT3 | MMDiT


def build_network(model: Model) -> Network:
    """The network of a resolved section (`Recipe.network`), initialised (random; seed torch first).

    Under `torch.device("meta")` it holds names and shapes only.
    """
    if isinstance(model, MMDiTSection):
        return MMDiT(model)
    if isinstance(model, STDiTSection):
        return STDiT(model)
    return STDiT2(model) if isinstance(model, STDiT2Section) else STDiT3(model)


def save_network(folder: Path, network: Network, origin: Origin, trained: Mapping[str, Tensor] | None = None) -> None:
    """Write the network's weights in float32; `trained` (an EMA, or an engine's masters) takes the place of its own.

    What is not trained (frozen weights, the null caption, rotary frequencies) is written as the network holds it.
    """
    state = {**network.state_dict(), **(trained or {})}
    save_weights(folder, state, network.card(origin))


def load_network(folder: Path, network: Network, recipe: str) -> Card:
    """Load a folder of `save_network` into a network of the recipe's size; returns the card.

    Raises CheckpointMismatch when the weights belong to another recipe, kind or size.
    """
    card = read_card(folder)
    check_card(folder, card, network.card(Origin(recipe, card.origin.stage)))
    network.load_state_dict(load_state(folder))
    return card


def num_parameters(network: nn.Module) -> int:
    """Learned parameters; buffers (the null caption, tables of positions) do not count."""
    return sum(parameter.numel() for parameter in network.parameters())
