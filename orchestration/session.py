"""One installation in one process: settings, recipes, Dagster instance and definitions, for the CLI to speak to."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import dagster as dg

from assets.factory import SHARDS, shard_assets
from assets.steps import StepError, Walk
from assets.tasks import Runner, Watch
from infra.settings import TELEMETRY_OFF, Settings
from ml.recipe import Recipe, RecipeError, user_folders
from orchestration.definitions import define
from orchestration.jobs import JOBS
from orchestration.resources import runner_of

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Session:
    """A recipe under the present settings, ready to be materialised in this process."""

    settings: Settings
    recipe: Recipe
    watch: Watch

    @classmethod
    def open(cls, name: str, profile: str | None, watch: Watch) -> "Session":
        """Load the settings and the recipe; raises RecipeError when the recipe does not hold together."""
        os.environ.update(TELEMETRY_OFF)  # before the first tool that reports home is imported
        settings = Settings()
        return cls(settings, Recipe.load(name, profile or settings.profile, user_folders()), watch)

    @cached_property
    def runner(self) -> Runner:
        """The runner, telling this session's watcher what happens."""
        return replace(runner_of([self.recipe], self.settings), watch=self.watch)

    @cached_property
    def definitions(self) -> dg.Definitions:
        """The definitions of this recipe alone, with this session's runner."""
        return define([self.recipe], self.runner)

    @property
    def walk(self) -> Walk:
        """The steps of the recipe."""
        return self.runner.walk

    @cached_property
    def instance(self) -> dg.DagsterInstance:
        """The Dagster instance that `dagster.yaml` at the root describes, the same that the UI shows."""
        os.environ.setdefault("DAGSTER_HOME", str(ROOT))
        return dg.DagsterInstance.get()

    def curate(self) -> None:
        """Materialise every shard of the recipe's corpora, up to its scores."""
        shards = self.walk.partitions(self.walk.step((self.recipe.name, "shots")))
        if not shards:
            corpora = ", ".join(self.recipe.corpus.names)
            raise StepError(
                f"no footage in corpus {corpora} of {self.walk.workspace.root}: `opensora corpus sample` fetches real "
                "footage, `opensora corpus add FOLDER --name NAME --licence L` takes your own"
            )
        self.instance.add_dynamic_partitions(str(SHARDS.name), shards)
        for shard in shards:
            self.execute("curate", shard, shard_assets(self.recipe, shard))

    def execute(self, job: str, partition: str | None = None, selection: Sequence[dg.AssetKey] = ()) -> None:
        """Run a job of the recipe in this process, or only the assets selected from it; raises what a step raised."""
        if job not in JOBS:
            raise RecipeError(f"no job {job!r}; a recipe has {', '.join(JOBS)}")
        chosen = self.definitions.resolve_job_def(f"{job}_{self.recipe.name}")
        unknown = [key for key in selection if key not in chosen.asset_layer.executable_asset_keys]
        if unknown:
            raise RecipeError(f"job {job} has no asset {unknown[0].to_user_string()}")
        try:
            chosen.execute_in_process(
                instance=self.instance,
                partition_key=partition,
                asset_selection=list(selection) or None,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except dg.DagsterError as error:
            if type(error).__name__ != "DagsterAssetCheckFailedError":  # it has no public name
                raise
            pages = self.walk.workspace.site
            raise StepError(f"{error}\nWhich rows fail which expectation is written in {pages}/*/*.html") from error
