"""The front door of Dagster: every asset, check, job, schedule and sensor of the recipes that the settings name."""

from collections.abc import Iterable

import dagster as dg

from assets.checks import budget_check, table_check
from assets.factory import to_asset
from assets.tasks import Runner
from infra.settings import Settings
from ml.recipe import Recipe
from orchestration.automation import new_shards, re_evaluation, settlement
from orchestration.jobs import recipe_jobs
from orchestration.resources import load_recipes, runner_of


def build_definitions(recipes: Iterable[Recipe], settings: Settings) -> dg.Definitions:
    """Definitions of these recipes under these settings; nothing heavy is imported and no server is asked."""
    chosen = tuple(recipes)
    return define(chosen, runner_of(chosen, settings))


def define(recipes: Iterable[Recipe], runner: Runner) -> dg.Definitions:
    """Definitions of these recipes with a runner that is made already."""
    chosen = tuple(recipes)
    steps = runner.walk.steps.values()
    jobs = {recipe.name: recipe_jobs(recipe, runner.walk) for recipe in chosen}
    by_name = {job.name: job for made in jobs.values() for job in made}
    return dg.Definitions(
        assets=[to_asset(step) for step in steps],
        asset_checks=[
            *(table_check(step) for step in steps if step.table),
            *(budget_check(step) for step in steps if step.name == "cost_report"),
        ],
        jobs=list(by_name.values()),
        schedules=[re_evaluation(recipe, by_name[f"judge_{recipe.name}"]) for recipe in chosen],
        sensors=[
            settlement(runner),
            *(new_shards(recipe, runner.walk, by_name[f"curate_{recipe.name}"]) for recipe in chosen),
        ],
        resources={"runner": runner},
        executor=dg.multiprocess_executor.configured({"max_concurrent": 2}),
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What `dagster dev`, `dg` and the daemon load."""
    settings = Settings()
    return build_definitions(load_recipes(settings), settings)
