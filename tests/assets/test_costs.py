"""Plan beside bill: sums that agree, failed attempts in view, and a report that moves with the ledger."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from assets.costs import cost_steps, plan_beside_bill, recipe_rows, totals
from assets.steps import Function, Walk
from infra.ledger import Purpose
from infra.runs import Bill, Status, Tag
from infra.settings import Settings
from infra.tracking import RunLog, Tracker
from infra.workspace import Workspace
from ml.entry import Call
from ml.plan import plan
from ml.recipe import Recipe


@pytest.fixture
def spend(tracker: Tracker) -> Callable[..., None]:
    """Add a closed run to the ledger: `spend(experiment, step, usd, purpose)`."""

    def add(experiment: str, step: str, usd: float, purpose: str = "data") -> None:
        tags = {Tag.STEP: step, Tag.PURPOSE: purpose, Tag.DEVICES: 2, Tag.PRICE_ROW: "cpu-assume-2026"}
        run = tracker.open(experiment, step, tags)
        status = Status.FAILED if purpose == Purpose.FAILED else Status.FINISHED
        tracker.close(run, status, {Bill.COST_USD: usd, Bill.WALL_SECONDS: 60.0})

    return add


@pytest.fixture
def spent(spend: Callable[..., None]) -> None:
    spend("opensora/corpus", "corpus/sample/sample.film", 0.10)
    spend("opensora/v2_0-tiny", "v2_0-tiny/dit_stage1", 0.25, Purpose.FAILED)
    spend("opensora/v2_0-tiny", "v2_0-tiny/dit_stage1", 0.50, Purpose.HEADLINE)
    spend("opensora/corpus", "corpus/foreign/foreign.x", 7.00)
    spend("opensora/other-tiny", "other-tiny/dit_stage1", 9.00, Purpose.HEADLINE)


@pytest.mark.usefixtures("spent")
def test_the_bill_holds_own_runs_and_shared_corpora_and_nobody_elses(tracker: Tracker, tiny_recipe: Recipe) -> None:
    rows = recipe_rows(tracker, tiny_recipe)
    found = totals(rows, tiny_recipe)
    assert found == {"headline_usd": pytest.approx(0.5), "all_in_usd": pytest.approx(0.85), "budget_usd": 1.0}
    table = plan_beside_bill(plan(tiny_recipe), rows).set_index("step")
    assert table["cost_usd"].sum() == pytest.approx(found["all_in_usd"])
    stage = table.loc["v2_0-tiny/dit_stage1"]
    assert (stage["attempts"], stage["failed_usd"]) == (2, pytest.approx(0.25))
    assert stage["planned_usd"] == pytest.approx(plan(tiny_recipe).stages[0].usd)
    assert pd.isna(table.loc["corpus/sample/sample.film", "planned_usd"])


def call_of(tmp_path: Path, recipe: Recipe) -> Call:
    (tmp_path / "out").mkdir(exist_ok=True)
    return Call("op", recipe, tmp_path, tmp_path / "out", {}, {}, RunLog())


@pytest.mark.usefixtures("spent")
def test_the_report_writes_bill_ledger_and_picture(tmp_path: Path, tracker: Tracker, tiny_recipe: Recipe) -> None:
    _, report = cost_steps(tiny_recipe, Settings(tracking_uri=tracker.uri))
    assert isinstance(report.work, Function)
    call = call_of(tmp_path, tiny_recipe)
    report.work.call(call)
    metrics = json.loads((call.out / "result.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["all_in_usd"] == pytest.approx(0.85)
    assert metrics["failed_attempts"] == 1
    assert pd.read_csv(call.out / "ledger.csv")["cost_usd"].sum() == pytest.approx(0.85)
    assert (call.out / "costs.png").stat().st_size > 1000


@pytest.mark.usefixtures("spent")
def test_a_new_run_makes_the_report_stale(
    tracker: Tracker, tiny_recipe: Recipe, workspace: Workspace, spend: Callable[..., None]
) -> None:
    _, report = cost_steps(tiny_recipe, Settings(tracking_uri=tracker.uri))
    walk = Walk({report.key: report}, workspace)
    before = walk.key(report, "", {})
    assert walk.key(report, "", {}) == before
    spend("opensora/v2_0-tiny", "v2_0-tiny/samples", 0.01, "eval")
    assert walk.key(report, "", {}) != before


def test_the_plan_is_written_with_what_was_published(tmp_path: Path) -> None:
    recipe = Recipe.load("v2_0", "paper")
    before, _ = cost_steps(recipe, Settings())
    assert isinstance(before.work, Function)
    call = call_of(tmp_path, recipe)
    before.work.call(call)
    written = json.loads((call.out / "plan.json").read_text(encoding="utf-8"))
    assert [row["published_gpu_days"] for row in written["stages"]] == [2240, 384, 1536]
    assert sum(row["usd"] for row in written["stages"]) == pytest.approx(plan(recipe).usd)
