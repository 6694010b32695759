"""Clips on request: weights, a prompt, references, and changes to the sampling section.

Weights are the last checkpoint of a recipe, or folders that `opensora weights import` wrote.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from assets.autoencoder import autoencoder_key
from assets.checkpoints import last_checkpoint_key
from assets.steps import Entry, Made, Step, StepError
from infra.ledger import Purpose
from infra.workspace import Workspace
from ml.recipe import Recipe, RecipeError
from orchestration.session import Session


@dataclass(frozen=True)
class Ask:
    """What a person asks for: a prompt, pictures or videos it is given, `KEY=VALUE` of `sampling`, seeds.

    `weights` and `autoencoder` are weights folders to use instead of what the recipe's steps made.
    """

    prompt: str
    references: Sequence[Path]
    changes: Sequence[str]
    seeds: Sequence[int]
    weights: Path | None = None
    autoencoder: Path | None = None


def generate(session: Session, ask: Ask) -> Path:
    """Make the clips in a new folder of the workspace and return it.

    Nothing is made before everything is there. Raises StepError while the recipe has no checkpoint and none was given,
    CheckpointMismatch for a folder without weights, RecipeError for a change that the recipe refuses or a reference
    that does not exist, MaskStrategyError for a prompt whose tail cannot be read, and TaskFailed when sampling does,
    with its last words. Sampling is a task like any other: it has a run, and its cost is on the recipe's bill.
    """
    recipe = changed(session.recipe, ask)
    inputs = {
        "checkpoint": (_folder(session, ask.weights, last_checkpoint_key(recipe)),),
        "autoencoder": (_folder(session, ask.autoencoder, autoencoder_key(recipe)),),
    }
    request, references = _request(ask)
    out = _new_folder(session.walk.workspace, recipe)
    for path, name in zip(references, request["references"], strict=True):
        shutil.copyfile(path, out / name)
    (out / "prompts.json").write_text(json.dumps([request]), encoding="utf-8")
    session.runner.once(_step(recipe), out, {**inputs, "prompts": (out,)})
    return out


def changed(recipe: Recipe, ask: Ask) -> Recipe:
    """The recipe with changes to its sampling section and these seeds; RecipeError names what it refuses."""
    document: dict[str, Any] = recipe.model_dump(mode="json")
    for change in ask.changes:
        key, separator, value = change.partition("=")
        if not separator:
            raise RecipeError(f"--set takes KEY=VALUE of the sampling section, such as steps=30; got {change!r}")
        try:
            document["sampling"][key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {change}: {value!r} is not YAML: {' '.join(str(error).split())}") from error
    document["evaluation"]["seeds"] = list(ask.seeds)
    return Recipe.validate_document(document, "--set")


def _step(recipe: Recipe) -> Step:
    """What is billed: a sampling that belongs to no walk."""
    return Step(
        key=(recipe.name, "generated"),
        group="judgement",
        description="Clips on request.",
        work=Entry("ml.sample", "samples", recipe.compute.sample),
        purpose=Purpose.EVAL,
        recipe=recipe,
    )


def _request(ask: Ask) -> tuple[dict[str, Any], list[Path]]:
    """The entry of `prompts.json`, and the files it names; those of a prompt's tail lie where the caller stands."""
    from ml.diffusion.mask_strategy import split_tail

    wish = split_tail(ask.prompt)
    references = [Path(name) for name in (ask.references if wish.references is None else wish.references)]
    for path in references:
        if not path.is_file():
            raise RecipeError(f"reference {path} does not exist in {Path.cwd()}")
    names = [f"reference-{number}{path.suffix}" for number, path in enumerate(references)]
    strategy = {} if wish.strategy is None else {"mask_strategy": wish.strategy}
    return {"prompt": wish.text.strip(), "references": names, **strategy}, references


def _folder(session: Session, given: Path | None, key: tuple[str, str]) -> Path:
    """The weights folder that was given, or the step's; raises CheckpointMismatch, or StepError when there is none."""
    from ml.models.weights import read_card

    folder = _made(session, key).folder if given is None else given.absolute()
    read_card(folder)
    return folder


def _new_folder(workspace: Workspace, recipe: Recipe) -> Path:
    """A folder that no other call has, even in the same second."""
    name = f"{recipe.id}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        out = workspace.root / "generated" / (name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        return out
    raise AssertionError("count() does not end")


def _made(session: Session, key: tuple[str, str]) -> Made:
    made = session.walk.current(session.walk.step(key))
    if made is None:
        raise StepError(
            f"{'/'.join(key)} has not been made yet: opensora demo --recipe {session.recipe.name} makes it; or give "
            "folders of `opensora weights import` as --weights and --autoencoder"
        )
    return made
