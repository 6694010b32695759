"""Asset checks: Great Expectations on every table (critical blocks, warning warns), and the budget on the bill."""

import json
from typing import Any

import dagster as dg
import pandas as pd

from assets.steps import Step
from assets.tasks import Runner
from evaluation.expectations import Validation, validate
from ml import manifest
from ml.manifest import Table

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        manifest.VIDEOS,
        manifest.SHOTS,
        manifest.CLIPS,
        manifest.SCORES,
        manifest.CURATED,
        manifest.CAPTIONS,
        manifest.EXAMPLES,
        manifest.LATENTS,
    )
}


def table_check(step: Step) -> dg.AssetChecksDefinition:
    """The suite of a step's table over all its shards; a critical failure stops everything downstream."""

    @dg.asset_check(
        asset=dg.AssetKey(list(step.key)),
        name="expectations",
        blocking=True,
        description=f"Great Expectations suite of table `{step.table}`, with severities; failing ids are listed.",
    )
    def expectations(runner: dg.ResourceParam[Runner]) -> dg.AssetCheckResult:
        validation = check_table(runner, step)
        return dg.AssetCheckResult(
            passed=validation.success,
            severity=_severity(validation),
            metadata=_shown(validation),
        )

    return expectations


def check_table(runner: Runner, step: Step) -> Validation:
    """Validate the present rows of a step's table, over all shards it has been made for."""
    walk = runner.walk
    partitions = walk.partitions(step) if step.partitioned else [""]
    folders = [made.folder for name in partitions if (made := walk.current(step, name))]
    rows: pd.DataFrame = TABLES[step.table].read(*folders)
    site = walk.workspace.site / (step.recipe.id if step.recipe else "corpus")
    return validate(step.table, rows, step.recipe, site)


def budget_check(step: Step) -> dg.AssetChecksDefinition:
    """Whether the bill stays inside the recipe's budget; it warns, because the money is spent."""

    @dg.asset_check(
        asset=dg.AssetKey(list(step.key)),
        name="within_budget",
        description="All-in dollars against `budget_usd` of the recipe.",
    )
    def within_budget(runner: dg.ResourceParam[Runner]) -> dg.AssetCheckResult:
        made = runner.walk.current(step)
        metrics = json.loads((made.folder / "result.json").read_text(encoding="utf-8"))["metrics"] if made else {}
        spent, budget = (float(metrics[name]) if metrics else 0.0 for name in ("all_in_usd", "budget_usd"))
        return dg.AssetCheckResult(
            passed=spent <= budget,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"all_in_usd": spent, "budget_usd": budget},
        )

    return within_budget


def _severity(validation: Validation) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.ERROR if validation.max_severity == "critical" else dg.AssetCheckSeverity.WARN


def _shown(validation: Validation) -> dict[str, Any]:
    return {
        "expectations": validation.num_expectations,
        "failures": dg.MetadataValue.json([f.as_dict() for f in validation.failures]),
        "page": dg.MetadataValue.path(str(validation.page)),
    }
