"""Jobs: selections along the walk that a person or a schedule launches as one."""

from typing import TYPE_CHECKING

import dagster as dg

from assets.steps import Step, Walk
from ml.recipe import Recipe

if TYPE_CHECKING:  # what `dg.define_asset_job` returns has no public name
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition as AssetJob

JOBS = ("curate", "walk", "train", "judge", "release")
JUDGED = ("prompts", "samples", "loss_report", "reconstruction_report", "vbench_report", "preference_report", "report")


def recipe_jobs(recipe: Recipe, walk: Walk) -> list["AssetJob"]:
    """`curate` (a partition a shard), `walk` (everything after it), `train`, `judge` and `release` of one recipe."""
    steps = [step for step in walk.steps.values() if step.recipe == recipe or step.recipe is None]
    shards = [s for s in steps if s.partitioned and (s.recipe or s.name in recipe.corpus.names)]
    rest = [s for s in steps if not s.partitioned]
    training = [s for s in rest if s.group in ("autoencoder", "encoding", "training")]
    judged = [s for s in rest if s.group == "judgement" and (s.recipe is None or s.name in JUDGED)]
    spend = [s for s in rest if s.group in ("release", "dollars")]
    return [
        _job(recipe, "curate", shards, "One shard from raw video to scored clips."),
        _job(recipe, "walk", rest, "Everything after the shards: filtering, training, judgement, release, the bill."),
        _job(recipe, "train", training, "Autoencoder, latents and every transformer stage."),
        _job(recipe, "judge", judged, "Samples and reports of the last checkpoint."),
        _job(recipe, "release", spend, "Gate, registration and the bill."),
    ]


def _job(recipe: Recipe, name: str, steps: list[Step], description: str) -> "AssetJob":
    return dg.define_asset_job(
        name=f"{name}_{recipe.name}",
        selection=dg.AssetSelection.assets(*(dg.AssetKey(list(step.key)) for step in steps)),
        description=description,
        tags={"recipe": recipe.name, "profile": recipe.profile},
    )
