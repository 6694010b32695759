"""Weights on disk: `weights.safetensors`, and beside it `model.json`, the card that says whose they are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

WEIGHTS = "weights.safetensors"
CARD = "model.json"


class CheckpointMismatch(ValueError):  # noqa: N818  (the house names it so)
    """Weights that belong to another recipe, kind or size of network; the message names both."""


@dataclass(frozen=True)
class Origin:
    """Who made the weights: recipe id (`v2_0-tiny`) and stage (`stage1`)."""

    recipe: str
    stage: str


@dataclass(frozen=True)
class Card:
    """Everything needed to rebuild the network: kind, configuration, origin, and the scale of an autoencoder's latents.

    `latent` holds the fields of `ml.architectures.Latent`.
    """

    kind: str
    config: Mapping[str, Any]
    origin: Origin
    latent: Mapping[str, Any] | None = None


def save_weights(folder: Path, state: Mapping[str, Tensor], card: Card) -> None:
    """Write float32 weights and their card; both are renamed into place, the card last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / f"{WEIGHTS}.partial")
    (folder / f"{WEIGHTS}.partial").replace(folder / WEIGHTS)
    (folder / f"{CARD}.partial").write_text(json.dumps(asdict(card), indent=2, sort_keys=True), encoding="utf-8")
    (folder / f"{CARD}.partial").replace(folder / CARD)


def read_card(folder: Path) -> Card:
    """The card of a weights folder; raises CheckpointMismatch when the folder holds no finished weights."""
    if not ((folder / CARD).is_file() and (folder / WEIGHTS).is_file()):
        raise CheckpointMismatch(f"{folder} holds no finished weights ({WEIGHTS} and {CARD}); run its stage first")
    fields = json.loads((folder / CARD).read_text(encoding="utf-8"))
    return Card(**{**fields, "origin": Origin(**fields["origin"])})


def load_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a weights folder, on the CPU; raises CheckpointMismatch for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointMismatch(
            f"{folder / WEIGHTS} is cut short or damaged ({error}): delete {folder} and make it again, or copy it again"
        ) from error


def check_card(folder: Path, found: Card, wanted: Card) -> None:
    """Refuse weights of another kind, recipe or configuration (the stage and the latents' scale may differ).

    Raises CheckpointMismatch naming both sides of everything that differs.
    """
    differences = [
        f"{name} is {have!r}, wanted {want!r}"
        for name, have, want in (
            ("kind", found.kind, wanted.kind),
            ("recipe", found.origin.recipe, wanted.origin.recipe),
            *((f"config {key}", have, want) for key, have, want in _configs(found, wanted)),
        )
        if have != want
    ]
    if differences:
        raise CheckpointMismatch(f"{folder} belongs to another network: " + "; ".join(differences))


def _configs(found: Card, wanted: Card) -> list[tuple[str, Any, Any]]:
    have, want = (json.loads(json.dumps(dict(card.config))) for card in (found, wanted))
    return [(key, have.get(key), want.get(key)) for key in sorted({*have, *want})]
