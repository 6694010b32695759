"""Tables and progress for the terminal: what the CLI prints, and nothing that decides anything."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assets.steps import Made, Walk
from assets.tasks import Done, Watch
from ml.plan import Plan
from ml.recipe import Recipe

# A pipe has no width of its own; a table that is cut off says less than one that is wide.
console = Console(width=None if sys.stdout.isatty() else 120)


class Progress(Watch):
    """One line a finished step; on a terminal, a spinner with the last line of the task's log."""

    def __init__(self) -> None:
        self.made = 0
        self.reused = 0
        self._status = console.status("")

    def started(self, path: str) -> None:
        """Name the step that runs now."""
        if console.is_terminal:
            self._status.update(f"{path} …")
            self._status.start()
        else:
            console.print(f"  … {path}", highlight=False)

    def line(self, path: str, text: str) -> None:
        """Show a task's last words, on a terminal only."""
        last = text.replace("\r", "\n").strip().splitlines()[-1:]
        if console.is_terminal and last:
            self._status.update(f"{path} [dim]{escape(last[0][-90:])}[/dim]")

    def ended(self, path: str, done: Done, seconds: float) -> None:
        """Say whether the output was made or reused, how long it took and what it cost."""
        self._status.stop()
        if done.reused:
            self.reused += 1
            console.print(f"[dim]  = {path:<44} up to date[/dim]", highlight=False)
        else:
            self.made += 1
            console.print(f"  [green]+[/green] {path:<44} {seconds:6.1f} s  ${done.cost_usd:.4f}", highlight=False)


def plan_table(planned: Plan, recipe: Recipe) -> Table:
    """Tokens, FLOPs, GPU-hours and dollars of every stage beside the published figures."""
    table = Table(
        title=f"{recipe.title}, profile {recipe.profile}: the plan",
        caption=planned.assumption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    heads = ("steps", "tokens", "TF\n/step", "GPUs", "GPU-h", "GPU-\ndays", "US$")
    table.add_column("stage", no_wrap=True)
    for name in (*heads, "reported\nGPU-days", "reported\nUS$"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in planned.stages:
        published = stage.published
        table.add_row(
            stage.name,
            f"{stage.steps:,}",
            figure(stage.tokens),
            figure(stage.flops_per_device_step / 1e12),
            figure(stage.devices),
            *(figure(value) for value in (stage.gpu_hours, stage.gpu_hours / 24, stage.usd)),
            figure(published.gpu_days) if published else "-",
            figure(published.usd) if published else "-",
        )
    table.add_section()
    totals = (figure(value) for value in (planned.gpu_hours, planned.gpu_hours / 24, planned.usd))
    reported = figure(planned.published_usd) if planned.published_usd else "-"
    table.add_row("total", "", "", "", "", *totals, "", reported)
    return table


def figure(value: float) -> str:
    """A number as one reads it: thousands separated, three digits when it is small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def bill_table(table: pd.DataFrame, totals: dict[str, float]) -> Table:
    """Plan beside bill, step by step, and headline beside all-in."""
    shown = Table(
        title="The bill",
        caption=", ".join(f"{name.removesuffix('_usd')} ${usd:,.4f}" for name, usd in totals.items()),
    )
    for name in ("step", "attempts", "seconds", "US$", "of it failed", "planned US$"):
        shown.add_column(name, justify="left" if name == "step" else "right")
    for row in table.itertuples():
        planned = "-" if pd.isna(row.planned_usd) else f"{row.planned_usd:.4g}"
        spent = (f"{row.seconds:,.1f}", f"{row.cost_usd:.5f}", f"{row.failed_usd:.5f}")
        shown.add_row(row.step, str(row.attempts), *spent, planned)
    return shown


def funnel_table(facts: dict[str, Any]) -> Table:
    """How many clips came in, what each filter dropped, how many stayed."""
    table = Table(title="The funnel")
    for name in ("filter", "keeps", "before", "dropped", "after"):
        table.add_column(name, justify="left" if name in ("filter", "keeps") else "right")
    for row in facts["funnel"]:
        counts = (str(row[name]) for name in ("before", "dropped", "after"))
        table.add_row(row["name"], escape(row["rule"]), *counts)
    return table


def status_table(walk: Walk) -> Table:
    """What is missing, stale or up to date, asset by asset and shard by shard."""
    table = Table(title=f"The walk in {walk.workspace.root}")
    for name in ("asset", "shard", "state", "key"):
        table.add_column(name)
    colours = {"up to date": "green", "stale": "yellow", "missing": "dim"}
    for step in walk.steps.values():
        for partition in walk.partitions(step) if step.partitioned else [""]:
            state, current = walk.state(step, partition), walk.current(step, partition)
            colour = colours[state]
            table.add_row(
                "/".join(step.key), partition, f"[{colour}]{state}[/{colour}]", current.key if current else ""
            )
    return table


def facts_of(walk: Walk, key: tuple[str, str]) -> Made | None:
    """What a step has now, for a summary."""
    return walk.current(walk.step(key))


def summary(walk: Walk, recipe: Recipe, bill: Table, seconds: float) -> None:
    """Funnel, losses, report and bill of a finished walk."""
    curated, losses, report, release = (
        facts_of(walk, (recipe.name, name)) for name in ("curated", "loss_report", "report", "release")
    )
    if curated:
        console.print(funnel_table(dict(curated.result["facts"])))
    if losses:
        console.print(loss_table(losses.folder / "losses.json"))
    if report:
        console.print(metric_table(report.folder / "report.json"))
    if release:
        facts = release.result["facts"]
        console.print(f"Gate {facts['gate']}: {facts['model']} version {facts['version']}", highlight=False)
        for line in facts["rules"]:
            console.print(f"  {line}", highlight=False, markup=False)
    console.print(bill)
    console.print(f"Workspace {walk.workspace.root}, {seconds:.0f} s on {time.strftime('%Y-%m-%d %H:%M')}")


def loss_table(path: Path) -> Table:
    """Held-out loss of the untrained model and of every stage."""
    losses = json.loads(path.read_text(encoding="utf-8"))
    table = Table(title="Held-out loss")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_row("untrained", f"{losses['untrained']:.4f}")
    for stage, value in losses["by_stage"].items():
        table.add_row(stage, f"{value:.4f}")
    return table


def metric_table(path: Path) -> Table:
    """Every metric of a report, and how many are absent."""
    report = json.loads(path.read_text(encoding="utf-8"))
    table = Table(
        title=f"Report {report['id']}", caption=f"{len(report['absent'])} metrics absent, each with its reason"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    return table


def recipe_table(recipes: dict[str, Path], describe: dict[str, str]) -> Table:
    """The recipes that can be loaded, with the first line of each one's header."""
    table = Table(title="Recipes")
    table.add_column("name")
    table.add_column("what it is")
    for name in recipes:
        table.add_row(name, describe[name])
    return table
