"""Official weights into the house and out of it: what `opensora weights import` and `opensora weights export` do.

An import is a folder of the workspace, `weights/<recipe>-<part>-<first 8 digits of the source's sha256>/`, with
`weights.safetensors` in the source's own dtypes, `model.json` like any weights folder, and `import.json`, which says
where they came from, under which licence, and what became of every name.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from infra.registry import Imported, Registry
from infra.storage import atomic_write, sha256_of
from infra.workspace import Workspace
from ml.architectures import AutoencoderNet, Latent, Model, Source
from ml.models.official import exports
from ml.models.official.convert import Checked, check
from ml.models.official.files import Header, OfficialError, open_official, write
from ml.models.official.looks import Part
from ml.models.official.rules import Target
from ml.models.weights import CARD, WEIGHTS, Card, Origin, read_card
from ml.recipe import Recipe

RECORD = "import.json"
STAGE = "released"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCK = re.compile(r"^(single_)?(?:spatial_|temporal_|double_)?blocks\.(\d+)\.")


@dataclass(frozen=True)
class Wish:
    """What to import: a file or folder, for which part of which recipe, in which layout, and what is known of it."""

    path: Path
    recipe: Recipe
    part: Part = "transformer"
    source: Source = "auto"
    licence: str = ""
    url: str = ""


@dataclass(frozen=True)
class Placed:
    """Weights that are in the workspace: their folder, digest and MLflow model, and whether they were there before."""

    folder: Path
    sha256: str
    model_id: str
    reused: bool


def check_weights(wish: Wish) -> Checked:
    """Hold the weights against the recipe's network by names and shapes, in seconds at any size.

    Raises OfficialError for weights that cannot be read; what does not fit is in the report.
    """
    return check(open_official(wish.path), target_of(wish.recipe, wish.part), wish.source)


def import_weights(wish: Wish, checked: Checked, workspace: Workspace, registry: Registry) -> Placed:
    """Convert checked weights into the workspace and record them in MLflow; the same import again changes nothing.

    Raises OfficialError when anything was refused; then nothing is written.
    """
    if not checked.report.fits:
        raise refusal(wish, checked)
    source = checked.official.sha256()
    folder = workspace.root / "weights" / f"{wish.recipe.id}-{wish.part}-{source[:8]}"
    reused = _finished(folder, wish, checked, source)
    if not reused:
        place(folder, wish, checked, source)
    imported = imported_from(wish, checked, folder, source)
    return Placed(folder, imported.sha256, registry.record(imported), reused)


def imported_from(wish: Wish, checked: Checked, folder: Path, source_sha256: str) -> Imported:
    """What MLflow is told of placed weights."""
    about = {"kind": read_card(folder).kind, "recipe": wish.recipe.id, "part": wish.part}
    return Imported(
        name=f"opensora-{wish.recipe.id}-{wish.part}",
        weights_uri=(folder / WEIGHTS).absolute().as_uri(),
        sha256=sha256_of(folder / WEIGHTS),
        source=wish.path.name,
        source_sha256=source_sha256,
        source_url=wish.url,
        licence=wish.licence,
        params={**about, "layout": checked.report.source},
    )


def export_weights(folder: Path, layout: exports.Layout, to: Path) -> tuple[str, ...]:
    """Write a weights folder in an official layout, and say what was changed on the way.

    `to` is a safetensors file; for diffusers it is a new folder, which `from_pretrained` reads. Raises OfficialError
    for layouts that the network does not have, and for a target of the wrong kind.
    """
    card = read_card(folder)
    planned = exports.export(open_official(folder / WEIGHTS), card, layout)
    if layout == "diffusers":
        if to.suffix == ".safetensors":
            raise OfficialError(f"{to}: diffusers' layout is a folder, give one that does not exist yet")
        write(to / DIFFUSERS_WEIGHTS, planned.headers, planned.tensors())
        atomic_write(to / "config.json", json.dumps(planned.config, indent=2))
        return planned.notes
    if to.suffix != ".safetensors":
        raise OfficialError(f"{to}: give a file that ends in .safetensors")
    if to.absolute() == (folder / WEIGHTS).absolute():
        raise OfficialError(f"{to} is the file to export; give another one")
    write(to, planned.headers, planned.tensors())
    return planned.notes


def target_of(recipe: Recipe, part: Part) -> Target:
    """The recipe's network as names and shapes, built without memory."""
    with torch.device("meta"):
        network = _build(recipe, part)
    section = _section(recipe, part)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return Target(recipe.id, section.kind, section.model_dump(mode="json"), wanted)


def refusal(wish: Wish, checked: Checked) -> OfficialError:
    """Everything that was refused in one message: what to do first, then the first names."""
    refused = checked.report.having("refused")
    lines = [f"  {entry.name}: {entry.how}" for entry in refused[:5]]
    more = [f"  and {len(refused) - 5} more"] if len(refused) > 5 else []
    first = f"{wish.path} does not fit {wish.recipe.id}'s {wish.part}: {checked.report.hint}"
    return OfficialError("\n".join([first, *lines, *more]))


def place(folder: Path, wish: Wish, checked: Checked, source_sha256: str) -> None:
    """Write the converted weights of a checked import tensor by tensor, then `import.json`, then the card.

    Raises OfficialError when something was refused, or when nothing says how an autoencoder's latents are normalised.
    """
    if not checked.report.fits:
        raise refusal(wish, checked)
    card = _card(wish, checked)
    (folder / CARD).unlink(missing_ok=True)  # the card of an earlier import, until the new one is whole
    arrived = {name: made.header for name, made in checked.arrived.items()}
    usual = Counter(header.dtype for header in arrived.values()).most_common(1)[0][0]
    fresh = {name: tensor.to(usual) for name, tensor in _fresh(wish, checked.initialised).items()}
    wanted = arrived | {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in fresh.items()}
    write(folder / WEIGHTS, wanted, chain(checked.tensors(), fresh.items()))
    atomic_write(folder / RECORD, _record_text(wish, checked, source_sha256))
    atomic_write(folder / CARD, _card_text(card))


# --- networks -----------------------------------------------------------------------------------------------------


def _section(recipe: Recipe, part: Part) -> Model | AutoencoderNet:
    return recipe.network if part == "transformer" else recipe.autoencoder.net


def _build(recipe: Recipe, part: Part, model: Model | None = None) -> nn.Module:
    """The module that has the released names."""
    from ml.models.autoencoders.registry import build_autoencoder
    from ml.models.networks import build_network

    if part == "transformer":
        return build_network(model or recipe.network)
    return build_autoencoder(recipe.autoencoder.net).net


def _fresh(wish: Wish, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Initial values of names without a source, drawn with the recipe's seed.

    They come from a network only as deep as the names need: a FLUX.1 import lacks one small layer, and 11.89 billion
    parameters would be drawn for it.
    """
    if not names:
        return {}
    model = _shallow(wish.recipe.network, names) if wish.part == "transformer" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wish.recipe.seed)
        state = _build(wish.recipe, wish.part, model).state_dict()
    return {name: state[name].detach() for name in names}


def _shallow(model: Model, names: tuple[str, ...]) -> Model:
    depths = Counter({"depth": 1, "depth_single_blocks": 1})
    for match in filter(None, map(BLOCK.match, names)):
        field = "depth_single_blocks" if match[1] else "depth"
        depths[field] = max(depths[field], int(match[2]) + 1)
    return model.model_copy(update={name: depth for name, depth in depths.items() if name in type(model).model_fields})


# --- records ------------------------------------------------------------------------------------------------------


def _card(wish: Wish, checked: Checked) -> Card:
    """What `model.json` will say; an autoencoder's latents are normalised as its weights say, else as the recipe."""
    origin, section = Origin(wish.recipe.id, STAGE), _section(wish.recipe, wish.part)
    if wish.part == "transformer":
        return Card(section.kind, section.model_dump(mode="json"), origin)
    latent = _latent(checked) or wish.recipe.autoencoder.latent
    if latent is None:
        raise OfficialError(
            f"{wish.recipe.id} does not say how latents are normalised, and these weights do not either: choose a "
            "profile with autoencoder.latent (`paper` has the published one)"
        )
    return Card(section.kind, section.model_dump(mode="json", exclude={"kind"}), origin, latent.model_dump(mode="json"))


def _latent(checked: Checked) -> Latent | None:
    """Mean and deviation of latents that the weights carry as `shift` and `scale` (OpenSora-VAE 1.2)."""
    if not {"shift", "scale"} <= set(checked.official.headers):
        return None
    mean, std = (tuple(checked.official.read(name).double().flatten().tolist()) for name in ("shift", "scale"))
    return Latent(mean=mean, std=std)


def _record_text(wish: Wish, checked: Checked, sha256: str) -> str:
    files = [file.name for file in checked.official.files]
    known = {"recipe": wish.recipe.id, "part": wish.part, "licence": wish.licence, "url": wish.url, "sha256": sha256}
    record = {**known, "files": files, "dtypes": _dtypes(checked), **checked.report.to_dict()}
    return json.dumps(record, indent=2, sort_keys=True)


def _dtypes(checked: Checked) -> dict[str, int]:
    """Tensors by dtype: weights stay as precise as they were published."""
    found = Counter(str(made.header.dtype).removeprefix("torch.") for made in checked.arrived.values())
    return dict(sorted(found.items()))


def _finished(folder: Path, wish: Wish, checked: Checked, sha256: str) -> bool:
    """Whether this very import is there already."""
    files = {CARD: _card_text(_card(wish, checked)), RECORD: _record_text(wish, checked, sha256)}
    same = ((folder / n).is_file() and (folder / n).read_text(encoding="utf-8") == text for n, text in files.items())
    return (folder / WEIGHTS).is_file() and all(same)


def _card_text(card: Card) -> str:
    return json.dumps(asdict(card), indent=2, sort_keys=True)
