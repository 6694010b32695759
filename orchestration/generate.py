"""Clips on request: the last checkpoint of a recipe, a prompt, references, and changes to the sampling section."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from assets.autoencoder import autoencoder_key
from assets.checkpoints import checkpoint_key
from assets.steps import Made, StepError
from infra.tracking import RunLog
from ml.entry import Call
from ml.recipe import Recipe, RecipeError
from orchestration.session import Session


@dataclass(frozen=True)
class Ask:
    """What a person asks for: a prompt, pictures or videos it is given, `KEY=VALUE` of `sampling`, seeds."""

    prompt: str
    references: Sequence[Path]
    changes: Sequence[str]
    seeds: Sequence[int]


def generate(session: Session, ask: Ask) -> Path:
    """Make the clips in a new folder of the workspace and return it.

    Raises StepError while the recipe has no checkpoint yet, RecipeError for a change that the recipe refuses.
    """
    from ml.sample import make_samples  # brings torch

    recipe = changed(session.recipe, ask)
    out = session.walk.workspace.root / "generated" / f"{recipe.id}-{time.strftime('%Y%m%d-%H%M%S')}"
    out.mkdir(parents=True)
    names = [f"reference-{number}{path.suffix}" for number, path in enumerate(ask.references)]
    for path, name in zip(ask.references, names, strict=True):
        shutil.copyfile(path, out / name)
    (out / "prompts.json").write_text(json.dumps([{"prompt": ask.prompt, "references": names}]), encoding="utf-8")
    inputs = {
        "prompts": (out,),
        "checkpoint": (_made(session, checkpoint_key(recipe, recipe.stages[-1])).folder,),
        "autoencoder": (_made(session, autoencoder_key(recipe)).folder,),
    }
    make_samples(Call("samples", recipe, session.walk.workspace.root, out, inputs, {}, RunLog(None, None)))
    return out


def changed(recipe: Recipe, ask: Ask) -> Recipe:
    """The recipe with changes to its sampling section and these seeds; RecipeError names what it refuses."""
    document: dict[str, Any] = recipe.model_dump(mode="json")
    for change in ask.changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise RecipeError(f"--set takes KEY=VALUE of the sampling section, such as steps=30; got {change!r}")
        document["sampling"][key] = yaml.safe_load(value)
    document["evaluation"]["seeds"] = list(ask.seeds)
    return Recipe.validate_document(document, "--set")


def _made(session: Session, key: tuple[str, str]) -> Made:
    made = session.walk.current(session.walk.step(key))
    if made is None:
        raise StepError(f"{'/'.join(key)} has not been made yet: opensora demo --recipe {session.recipe.name}")
    return made
