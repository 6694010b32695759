"""Dollars: the plan before anything is spent, and the bill beside it afterwards."""

import json
from functools import partial

import pandas as pd

from assets.steps import Function, Step
from infra.ledger import Ledger, Purpose, headline
from infra.settings import Settings
from infra.tracking import Tracker
from ml.entry import Call
from ml.plan import Plan, plan
from ml.recipe import Recipe

CORPUS = "opensora/corpus"


def cost_steps(recipe: Recipe, settings: Settings) -> list[Step]:
    """`cost_plan`, which needs nothing, and `cost_report`, after everything."""
    before = Step(
        key=(recipe.name, "cost_plan"),
        group="dollars",
        description="Tokens, FLOPs, GPU-hours and dollars of every stage, predicted, beside what was published.",
        work=Function(write_plan, billed=False),
        purpose="eval",
        recipe=recipe,
        reads=("model", "text", "autoencoder", "stages", "compute", "budget_usd"),
        kinds=frozenset({"python"}),
        owner="team:finance",
    )
    after = Step(
        key=(recipe.name, "cost_report"),
        group="dollars",
        description="What every attempt cost, failed ones too: headline beside all-in, plan beside bill, step by step.",
        work=Function(partial(write_bill, tracking_uri=settings.tracking_uri), billed=False),
        purpose="eval",
        recipe=recipe,
        reads=("budget_usd",),
        inputs={"plan": (before.key,), "release": ((recipe.name, "release"),)},
        kinds=frozenset({"mlflow", "pandas"}),
        owner="team:finance",
        fingerprint=lambda workspace, partition: _bill_digest(settings.tracking_uri, recipe),
    )
    return [before, after]


def write_plan(call: Call) -> None:
    """Write `plan.json` and the plan's totals."""
    planned = plan(call.recipe)
    rows = [
        {
            "stage": stage.name,
            "gpu_hours": stage.gpu_hours,
            "usd": stage.usd,
            "published_gpu_days": stage.published.gpu_days if stage.published else None,
            "published_usd": stage.published.usd if stage.published else None,
        }
        for stage in planned.stages
    ]
    (call.out / "plan.json").write_text(json.dumps({"stages": rows, "budget_usd": call.recipe.budget_usd}, indent=2))
    call.finish({"planned_usd": planned.usd, "planned_gpu_hours": planned.gpu_hours}, facts={"stages": rows})


def write_bill(call: Call, tracking_uri: str) -> None:
    """Write `bill.csv` (one row a step) and `costs.png`: plan beside bill."""
    rows = recipe_rows(Tracker(tracking_uri), call.recipe)
    table = plan_beside_bill(plan(call.recipe), rows)
    table.to_csv(call.out / "bill.csv", index=False)
    rows.to_csv(call.out / "ledger.csv", index=False)
    _draw(table, call.out / "costs.png")
    facts = {"attempts": len(rows), "failed_attempts": int((rows["purpose"] == Purpose.FAILED).sum())}
    call.finish(totals(rows, call.recipe) | facts, pictures=["costs.png"], data=["bill.csv"])


def totals(rows: pd.DataFrame, recipe: Recipe) -> dict[str, float]:
    """Headline (what papers report), all-in (what was paid), and the recipe's budget, in dollars."""
    paid, reported = float(rows["cost_usd"].sum()), float(headline(rows)["cost_usd"].sum())
    return {"headline_usd": reported, "all_in_usd": paid, "budget_usd": recipe.budget_usd}


def recipe_rows(tracker: Tracker, recipe: Recipe) -> pd.DataFrame:
    """The ledger rows that a recipe's bill is made of: its own runs and those of the corpora it uses."""
    ledger = Ledger(tracker)
    shared, own = ledger.rows(CORPUS), ledger.rows(f"opensora/{recipe.id}")
    used = tuple(f"corpus/{name}/" for name in recipe.corpus.names)
    return pd.concat([shared[shared["step"].str.startswith((*used, "weights/"))], own], ignore_index=True)


def plan_beside_bill(planned: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """One row a step: attempts, seconds, dollars spent, dollars spent in failed attempts, dollars planned."""
    spoiled = rows["cost_usd"].where(rows["purpose"].isin([Purpose.FAILED, Purpose.PREEMPTED]), 0.0)
    grouped = rows.assign(failed_usd=spoiled).groupby("step", sort=False)
    table = grouped.agg(
        attempts=("run_id", "size"),
        seconds=("seconds", "sum"),
        cost_usd=("cost_usd", "sum"),
        failed_usd=("failed_usd", "sum"),
    ).reset_index()
    expected = {f"dit_{stage.name}": stage.usd for stage in planned.stages}
    return table.assign(planned_usd=table["step"].str.split("/").str[-1].map(expected))


def _bill_digest(tracking_uri: str, recipe: Recipe) -> str:
    rows = recipe_rows(Tracker(tracking_uri), recipe)
    return str(sorted(f"{r.run_id}:{r.status}:{r.cost_usd:.6f}" for r in rows.itertuples()))


def _draw(table: pd.DataFrame, path: object) -> None:
    """Horizontal bars, one a step: what the bill says, with lost attempts in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(table) + 1.2), layout="constrained")
    good = table["cost_usd"] - table["failed_usd"]
    axes.barh(table["step"], good, color="#3b6fb6", label="made it")
    axes.barh(table["step"], table["failed_usd"], left=good, color="#c8553d", label="failed attempts")
    axes.plot(table["planned_usd"], table["step"], "k|", markersize=14, label="planned")
    axes.invert_yaxis()
    axes.set_xlabel("US dollars")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)  # type: ignore[arg-type]  # a Path
    plt.close(figure)
