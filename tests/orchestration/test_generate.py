"""Clips on request, from checkpoints that lie where the walk leaves them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from assets.autoencoder import autoencoder_key
from assets.checkpoints import checkpoint_key
from assets.steps import StepError
from assets.tasks import Watch
from infra.settings import Settings
from infra.workspace import Workspace
from ml.models.autoencoders.registry import build_autoencoder, save_autoencoder
from ml.models.networks import save_network
from ml.models.weights import Origin
from ml.recipe import Recipe, RecipeError
from ml.training.networks import new_transformer
from orchestration.generate import Ask, changed, generate
from orchestration.session import Session

QUICK = ("steps=1", "frames=5", "resolution=64px")


@pytest.fixture
def session(workspace: Workspace, tiny_recipe: Recipe) -> Session:
    """The tiny recipe in a workspace of the test's own, nothing made yet."""
    return Session(Settings(workspace=str(workspace.root)), tiny_recipe, Watch())


def make(session: Session, key: tuple[str, str]) -> Path:
    """The folder of a step, finished, for its weights to be put in."""
    walk = session.walk
    step = walk.step(key)
    folder = walk.workspace.step(step.path(""), "0" * 16)
    folder.mkdir(parents=True)
    result = {"op": "x", "metrics": {}, "facts": {}, "pictures": [], "data": [], "data_version": "0" * 16}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    made = walk.finished(step, "", "0" * 16)
    assert made is not None
    walk.point(step, "", made)
    return folder


def test_changes_are_of_the_sampling_section_and_checked(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, Ask("a cat", (), ("steps=7", "condition=i2v_head", "oscillate=false"), (3, 4)))
    assert (recipe.sampling.steps, recipe.sampling.condition, recipe.sampling.oscillate) == (7, "i2v_head", False)
    assert recipe.evaluation.seeds == (3, 4)
    assert recipe.model == tiny_recipe.model
    assert recipe.id == tiny_recipe.id, "its checkpoints stay its own"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("steps", "takes KEY=VALUE of the sampling section, such as steps=30; got 'steps'"),
        ("stepz=3", r"sampling\.stepz: unknown key \(did you mean 'steps'\?\)"),
        ("frames=6", "6 frames cannot be encoded by hunyuan; use 5 or 9"),
        ("condition=quarter_head", "condition"),
        ("solver=ddpm", "of rectified flow, which the ddpm solver does not solve"),
    ],
)
def test_changes_that_the_recipe_refuses_are_named(tiny_recipe: Recipe, change: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        changed(tiny_recipe, Ask("a cat", (), (change,), (0,)))


def test_nothing_is_made_before_there_is_a_checkpoint(session: Session) -> None:
    with pytest.raises(StepError, match=r"has not been made yet: opensora demo --recipe v2_0"):
        generate(session, Ask("a cat", (), (), (0,)))


def test_clips_are_made_of_the_last_checkpoint_with_the_pictures_given(session: Session, tmp_path: Path) -> None:
    recipe = session.recipe
    torch.manual_seed(0)
    net, folder = recipe.autoencoder.net, make(session, autoencoder_key(recipe))
    save_autoencoder(folder, build_autoencoder(net), net, Origin(recipe.id, "vae_stage1"))
    folder = make(session, checkpoint_key(recipe, recipe.stages[-1]))
    save_network(folder, new_transformer(recipe), Origin(recipe.id, recipe.stages[-1].name))
    cv2.imwrite(str(tmp_path / "red.png"), np.full((48, 80, 3), (0, 0, 255), np.uint8))
    out = generate(session, Ask("a red wave", (tmp_path / "red.png",), (*QUICK, "condition=i2v_head"), (5, 6)))
    assert out.parent == session.walk.workspace.root / "generated"
    rows = pd.read_parquet(out / "samples.parquet")
    assert rows[["prompt", "seed", "frames"]].to_numpy().tolist() == [["a red wave", 5, 5], ["a red wave", 6, 5]]
    assert all((out / path).is_file() for path in rows["path"])
    assert (out / "reference-0.png").is_file()
