"""Tables: the numbers that were measured are the numbers that are printed."""

import io
import json
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from assets.steps import Made
from assets.tasks import Done
from ml.plan import plan
from ml.recipe import Recipe
from orchestration import show


def text(table: Table) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_plan_shows_totals_and_published_figures() -> None:
    recipe = Recipe.load("v2_0", "paper")
    printed = text(show.plan_table(plan(recipe), recipe))
    assert "2,240" in printed
    assert f"{plan(recipe).usd:,.0f}"[:3] in printed


def test_the_bill_shows_what_failed_and_what_was_planned() -> None:
    rows = {"step": ["a", "b"], "attempts": [2, 1], "seconds": [90.0, 3.0], "cost_usd": [0.5, 0.25]}
    table = pd.DataFrame({**rows, "failed_usd": [0.1, 0.0], "planned_usd": [0.4, float("nan")]})
    printed = text(show.bill_table(table, {"headline_usd": 0.4, "all_in_usd": 0.75, "budget_usd": 1.0}))
    assert "0.10000" in printed
    assert "headline $0.4000, all_in $0.7500, budget $1.0000" in printed


def test_losses_and_metrics_are_read_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "losses.json").write_text(json.dumps({"untrained": 1.25, "by_stage": {"stage1": 0.75}}))
    assert "0.7500" in text(show.loss_table(tmp_path / "losses.json"))
    report = {"id": "abc", "absent": {"vbench/scene": "no weights"}, "metrics": {"reconstruction/psnr": 20.5}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    printed = text(show.metric_table(tmp_path / "report.json"))
    assert "20.5000" in printed
    assert "1 metrics absent" in printed


def test_the_funnel_keeps_its_order() -> None:
    rows = [{"name": "licence", "rule": "allowed", "before": 9, "dropped": 1, "after": 8}]
    rows += [{"name": "motion", "rule": ">= 0.1", "before": 8, "dropped": 3, "after": 5}]
    printed = text(show.funnel_table({"funnel": rows}))
    assert printed.index("licence") < printed.index("motion")


def test_progress_counts_what_was_made_and_what_was_reused() -> None:
    progress = show.Progress()
    made = Made("p", "k", Path(), {})
    for reused in (True, False, False):
        progress.ended("p", Done(made, reused, 0.1), 1.0)
    assert (progress.made, progress.reused) == (2, 1)
