from pathlib import Path
from typing import Any

import pytest

from ml.recipe import Recipe
from ml.training.plans import autoencoder_plan, stage_plan


def plans(recipe: Recipe) -> list[Any]:
    out = Path("out")
    return [stage_plan(recipe, stage, out) for stage in recipe.stages] + [
        autoencoder_plan(recipe, stage, out) for stage in recipe.autoencoder.stages
    ]


def test_every_stage_has_an_identity_and_a_seed_of_its_own(mini: Recipe) -> None:
    made = plans(mini)
    assert len({plan.identity for plan in made}) == len({plan.seed for plan in made}) == 4
    assert made == plans(mini)
    assert (made[0].steps, made[0].checkpoint_every, made[0].ema_decay) == (6, 2, 0.9)
    assert made[-1].ema_decay is None
    assert [plan.autoencoder for plan in made] == [False] * 3 + [True]


@pytest.mark.parametrize(
    "over", [{"compute": {"accelerators": "H200:1", "nodes": 1, "price": "h200-hist-2025q1"}}, {"checkpoint_every": 5}]
)
def test_prices_hardware_and_cadence_leave_checkpoints_usable(make_recipe: Any, mini: Recipe, over: Any) -> None:
    changed = plans(make_recipe(stage=over, autoencoder_stage=over))
    assert [plan.identity for plan in changed] == [plan.identity for plan in plans(mini)]


@pytest.mark.parametrize("over", [{"steps": 7}, {"ema_decay": 0.5}, {"conditions": {"i2v_head": 1}}])
def test_what_changes_the_training_changes_the_identity(make_recipe: Any, mini: Recipe, over: Any) -> None:
    changed = make_recipe(stage=over)
    assert [a.identity == b.identity for a, b in zip(plans(changed), plans(mini), strict=True)] == [False] * 3 + [True]


def test_the_seed_of_the_recipe_reaches_every_stage(make_recipe: Any, mini: Recipe) -> None:
    changed = plans(make_recipe(seed=43))
    assert all(a.seed != b.seed and a.identity != b.identity for a, b in zip(changed, plans(mini), strict=True))
