"""Asset checks: a critical failure is an error that blocks, a warning warns, and rows of all shards are read."""

import json

import dagster as dg
import pandas as pd
import pytest

from assets.checks import budget_check, check_table, table_check
from assets.steps import Function, Made, Step, Walk
from assets.tasks import Runner
from infra.compute.local import LocalLauncher
from infra.settings import Settings
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.manifest import SHOTS, stable_id
from ml.recipe import Recipe


def nothing(call: object) -> None:
    """A step that is never run here."""


@pytest.fixture
def runner(workspace: Workspace, tiny_recipe: Recipe) -> Runner:
    step = Step(
        (tiny_recipe.name, "shots"), "c", "d", Function(nothing), "data", tiny_recipe, table="shots", partitioned=True
    )
    walk = Walk({step.key: step}, workspace)
    return Runner(walk, LocalLauncher(), Tracker("sqlite://"), Settings(workspace=workspace.root))


def put(runner: Runner, shard: str, frame: pd.DataFrame) -> None:
    path = runner.walk.workspace.shard_list("sample", shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (step,) = runner.walk.steps.values()
    folder = runner.walk.workspace.step(step.path(f"sample.{shard}"), "0" * 16)
    folder.mkdir(parents=True)
    SHOTS.write(frame, folder)
    (folder / "result.json").write_text(json.dumps({"data_version": "x"}), encoding="utf-8")
    runner.walk.point(step, f"sample.{shard}", Made("p", "0" * 16, folder, {}))


def shots(shard: str, seconds: float = 2.0) -> pd.DataFrame:
    ids = [stable_id(shard, i) for i in range(3)]
    starts = [i * seconds for i in range(3)]
    frame = pd.DataFrame({"shot_id": ids, "video_id": stable_id(shard), "corpus": "sample", "shard": shard})
    spans = {"start_frame": [0, 48, 96], "end_frame": [48, 96, 144], "start_seconds": starts}
    return frame.assign(**spans, end_seconds=[start + seconds for start in starts])


def result_of(runner: Runner) -> dg.AssetCheckResult:
    (step,) = runner.walk.steps.values()
    check = table_check(step)
    outcome = check(runner)
    assert isinstance(outcome, dg.AssetCheckResult)
    return outcome


def test_rows_of_all_shards_are_validated_and_a_page_is_left(runner: Runner) -> None:
    put(runner, "film", shots("film"))
    put(runner, "live", shots("live"))
    (step,) = runner.walk.steps.values()
    validation = check_table(runner, step)
    assert (validation.num_rows, validation.success) == (6, True)
    assert validation.page == runner.walk.workspace.site / "v2_0-tiny" / "shots.html"
    assert result_of(runner).passed


def test_a_critical_failure_is_an_error_and_names_the_rows(runner: Runner) -> None:
    bad = shots("film").assign(end_frame=[48, 96, 40])
    put(runner, "film", bad)
    outcome = result_of(runner)
    assert not outcome.passed
    assert outcome.severity == dg.AssetCheckSeverity.ERROR
    assert bad["shot_id"].iloc[2] in str(outcome.metadata["failures"].value)


def test_a_warning_warns(runner: Runner) -> None:
    short = shots("film", seconds=0.2)
    put(runner, "film", short)
    outcome = result_of(runner)
    assert (outcome.passed, outcome.severity) == (False, dg.AssetCheckSeverity.WARN)


@pytest.mark.parametrize(("spent", "passed"), [(0.5, True), (1.5, False)])
def test_the_budget_warns_when_it_is_spent(runner: Runner, tiny_recipe: Recipe, spent: float, passed: bool) -> None:
    step = Step((tiny_recipe.name, "cost_report"), "dollars", "d", Function(nothing), "eval", tiny_recipe)
    folder = runner.walk.workspace.step(step.path(), "0" * 16)
    folder.mkdir(parents=True)
    metrics = {"all_in_usd": spent, "budget_usd": 1.0}
    (folder / "result.json").write_text(json.dumps({"metrics": metrics, "data_version": "x"}), encoding="utf-8")
    runner.walk.point(step, "", Made("p", "0" * 16, folder, {}))
    outcome = budget_check(step)(runner)
    assert isinstance(outcome, dg.AssetCheckResult)
    assert (outcome.passed, outcome.severity) == (passed, dg.AssetCheckSeverity.WARN)
