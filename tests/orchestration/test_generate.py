"""Clips on request: what may be changed, what is refused; making them is in tests/test_walk.py."""

from pathlib import Path

import pytest

from assets.steps import StepError
from assets.tasks import Watch
from infra.settings import Settings
from ml.recipe import Recipe, RecipeError
from orchestration.generate import Ask, changed, generate
from orchestration.session import Session


def ask(*changes: str) -> Ask:
    return Ask("a rabbit", (), changes, (7, 8))


def test_changes_are_read_as_the_recipe_reads_them(tiny_recipe: Recipe) -> None:
    recipe = changed(tiny_recipe, ask("steps=3", "condition=i2v_head", 'aspect="1:1"', "flow_shift=null"))
    assert (recipe.sampling.steps, recipe.sampling.condition, recipe.sampling.aspect) == (3, "i2v_head", "1:1")
    assert recipe.sampling.flow_shift is None
    assert recipe.evaluation.seeds == (7, 8)
    assert recipe.model == tiny_recipe.model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepps=3", "sampling.stepps: unknown key.*steps"),
        ("steps", "KEY=VALUE"),
        ("frames=18", "18 frames cannot be encoded by hunyuan; use 17 or 21"),
        ("condition=random", "sampling.condition"),
        ("solver=ddpm", "rectified flow, which the ddpm solver does not solve"),
    ],
)
def test_what_the_recipe_refuses_is_refused(tiny_recipe: Recipe, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(tiny_recipe, ask(change))


def test_without_a_checkpoint_it_says_how_to_get_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    session = Session(Settings(workspace=tmp_path / "w"), tiny_recipe, Watch())
    with pytest.raises(StepError, match="opensora demo --recipe v2_0"):
        generate(session, ask())
