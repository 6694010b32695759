"""What runs by itself: the scheduled re-evaluation, and the sensor that notices new footage.

Nothing here trains. Both start switched off: a person decides, in the Dagster UI, that they may spend.
"""

from typing import TYPE_CHECKING

import dagster as dg

from assets.factory import FRESH, SHARDS, shard_assets
from assets.steps import Walk
from assets.tasks import Runner
from infra.compute.attempt import Attempts
from ml.recipe import Recipe

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition as AssetJob


def re_evaluation(recipe: Recipe, job: "AssetJob") -> dg.ScheduleDefinition:
    """Samples and reports again on the recipe's schedule, though nothing changed: the stack under them may have."""

    @dg.schedule(
        name=f"re_evaluation_{recipe.name}",
        cron_schedule=recipe.evaluation.cron,
        job=job,
        description="Sample and judge the last checkpoint again, and keep the new report beside the old one.",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )
    def again(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        when = context.scheduled_execution_time.strftime("%Y-%m-%dT%H:%M")
        return dg.RunRequest(run_key=when, tags={FRESH: when})

    return again


def settlement(runner: Runner) -> dg.SensorDefinition:
    """Close and bill the runs of tasks whose orchestrator never came back; it spends nothing, so it starts running."""

    @dg.sensor(
        name="settle_runs",
        minimum_interval_seconds=300,
        description="Closes, with their cost, MLflow runs whose task ended while nobody was waiting for it.",
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def settle(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        closed = Attempts(runner.launcher, runner.tracker).settle()
        return dg.SkipReason(
            f"closed {len(closed)} runs: {', '.join(closed)}" if closed else "every ended task is billed"
        )

    return settle


def new_shards(recipe: Recipe, walk: Walk, job: "AssetJob") -> dg.SensorDefinition:
    """A partition and a `curate` run for every shard that a corpus of the recipe has and Dagster does not know."""
    step = walk.step((recipe.name, "shots"))

    @dg.sensor(
        name=f"new_shards_{recipe.name}",
        job=job,
        minimum_interval_seconds=60,
        description="Looks for shard lists that `opensora corpus add` wrote since the last look.",
        default_status=dg.DefaultSensorStatus.STOPPED,
    )
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        known = set(context.instance.get_dynamic_partitions(str(SHARDS.name)))
        fresh = [name for name in walk.partitions(step) if walk.current(step, name) is None]
        if not fresh:
            return dg.SkipReason("every shard has been curated under this recipe")
        requests = [
            dg.RunRequest(run_key=f"{recipe.id}:{name}", partition_key=name, asset_selection=shard_assets(recipe, name))
            for name in fresh
        ]
        added = SHARDS.build_add_request([name for name in fresh if name not in known])
        return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=[added])

    return look
