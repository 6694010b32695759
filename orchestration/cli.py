"""`opensora`: every verb of the pipeline, each a few lines that call what does the work.

Exit codes: 0 done, 1 the work failed or found something wrong, 2 the call or the recipe makes no sense.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from dagster import AssetKey
from rich.table import Table

from assets.costs import plan_beside_bill, recipe_rows, totals
from assets.tasks import Watch
from infra.settings import Settings
from infra.versioning import DataRepo
from ml.plan import plan as plan_of
from ml.recipe import Recipe, RecipeError, available, find, header, user_folders
from orchestration import show
from orchestration.problems import problems
from orchestration.session import Session
from orchestration.train_cli import TrainOptions, train
from orchestration.weights_cli import app as weights
from orchestration.weights_cli import taking

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
corpus = typer.Typer(help="Footage: what the walk starts from.", no_args_is_help=True)
dataset = typer.Typer(help="Frozen dataset versions: list them, bring one back.", no_args_is_help=True)
app.add_typer(corpus, name="corpus")
app.add_typer(dataset, name="dataset")
app.add_typer(weights, name="weights")
app.command("train")(taking(TrainOptions)(train))

Name = Annotated[str, typer.Argument(help="Recipe name, as `opensora recipes` lists it.", metavar="RECIPE")]
Profile = Annotated[str, typer.Option(help="Profile of the recipe: `tiny` fits a laptop, `paper` is as published.")]


@dataclass(frozen=True)
class SampleOptions:
    """What `sample` can be told; every field is an argument or option of the command line."""

    name: Name
    prompt: Annotated[str, typer.Option(help='Text; may end in {"mask_strategy": "0"} (1.1, 1.2).')]
    ref: Annotated[list[Path] | None, typer.Option(help="Picture or video to start from; repeat for several.")] = None
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of `sampling`: condition=i2v_head, frames=33.")
    ] = None
    seed: Annotated[list[int] | None, typer.Option(help="Seed; repeat for several clips.")] = None
    weights: Annotated[
        Path | None, typer.Option(help="Folder of `opensora weights import`, instead of the last checkpoint.")
    ] = None
    autoencoder: Annotated[
        Path | None, typer.Option(help="The same for the autoencoder: `weights import --part autoencoder`.")
    ] = None
    profile: Profile = "tiny"


@app.command()
def recipes() -> None:
    """List the recipes that can be loaded: the packaged ones, and those in `recipes/` below the working directory."""
    found = available(user_folders())
    show.console.print(show.recipe_table(found, {n: header(path).split("\n")[0] for n, path in found.items()}))


@app.command()
def check(name: Name, profile: Profile = "tiny") -> None:
    """Validate a recipe and say what it would need that this installation does not have."""
    with problems():
        recipe = Recipe.load(name, profile, user_folders())
        show.console.print(header(find(name, user_folders())), highlight=False, markup=False)
        for warning in (*plan_of(recipe).warnings, *_unmet(recipe)):
            show.console.print(f"[yellow]warning[/yellow] {warning}", highlight=False)
        show.console.print(
            f"[green]ok[/green] {recipe.id}: {len(recipe.stages)} stages, budget ${recipe.budget_usd:,.2f}"
        )


@app.command()
def plan(name: Name, profile: Profile = "paper") -> None:
    """Predict tokens, FLOPs, GPU-hours and dollars of every stage, beside what the original published."""
    with problems():
        recipe = Recipe.load(name, profile, user_folders())
        show.console.print(show.plan_table(plan_of(recipe), recipe))


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(help="Two recipes or more.", metavar="RECIPE RECIPE ...")],
    profile: Profile = "paper",
) -> None:
    """Set recipes side by side: networks, tokens, FLOPs a sample, plan and published dollars, measured reports."""
    from orchestration.compare import compare as table_of

    with problems():
        show.console.print(table_of(names, profile))


@app.command()
def demo(
    recipe: Annotated[str, typer.Option(help="Recipe to walk through.")] = "v2_0",
    profile: Profile = "tiny",
) -> None:
    """Walk the whole house on real footage: corpus, curation, training, judgement, release, bill. Safe to repeat."""
    with problems():
        started = time.time()
        progress = show.Progress()
        session = Session.open(recipe, profile, progress)
        _sample(session.settings)
        session.curate()
        session.execute("walk")
        show.summary(session.walk, session.recipe, _bill(session), time.time() - started)
        made = f"{progress.made} steps made, {progress.reused} up to date"
        nothing = "; nothing was recomputed" if not progress.made else ""
        show.console.print(f"[bold]{made}{nothing}[/bold]", highlight=False)
        show.console.print("Look at it: make ui", highlight=False)


@app.command()
def run(
    name: Name,
    job: Annotated[str, typer.Option(help="curate, walk, train, judge or release.")] = "walk",
    select: Annotated[list[str] | None, typer.Option(help="Only these assets, e.g. --select samples.")] = None,
    profile: Profile = "tiny",
) -> None:
    """Materialise a job of a recipe in this process; `make ui` does the same from the browser."""
    with problems():
        session = Session.open(name, profile, show.Progress())
        if job == "curate" and select:
            raise RecipeError("--select goes with the other jobs: curate makes whole shards")
        if job == "curate":
            session.curate()
        else:
            session.execute(job, selection=[AssetKey([name, asset]) for asset in select or ()])


@app.command()
def status(name: Name, profile: Profile = "tiny") -> None:
    """Say what is missing, stale or up to date, without making anything."""
    with problems():
        show.console.print(show.status_table(Session.open(name, profile, Watch()).walk))


@app.command()
def costs(name: Name, profile: Profile = "tiny") -> None:
    """Show plan beside bill per step, failed attempts included, headline beside all-in."""
    with problems():
        show.console.print(_bill(Session.open(name, profile, Watch())))


@app.command()
def report(name: Name, profile: Profile = "tiny") -> None:
    """Print the last report of a recipe: every metric under its protocol, and what is absent and why."""
    with problems():
        session = Session.open(name, profile, Watch())
        made = show.facts_of(session.walk, (name, "report"))
        if made is None:
            raise RecipeError(
                f"{name} has no report yet: opensora demo --recipe {name} --profile {session.recipe.profile}"
            )
        show.console.print((made.folder / "report.md").read_text(encoding="utf-8"), markup=False, highlight=False)


@app.command("sample")
@taking(SampleOptions)
def sample(options: SampleOptions) -> None:
    """Make clips of a prompt with the last checkpoint, or with imported weights, and print their folder."""
    from orchestration.generate import Ask, generate

    with problems():
        told = (options.ref or (), options.change or (), options.seed or (42,), options.weights, options.autoencoder)
        session = Session.open(options.name, options.profile, Watch())
        show.console.print(str(generate(session, Ask(options.prompt, *told))), highlight=False, soft_wrap=True)


@app.command()
def ui() -> None:
    """Start the Dagster UI with its daemon and the MLflow UI on loopback, print both addresses, stop on Ctrl-C."""
    from orchestration.servers import serve

    with problems():
        serve(Settings())


@app.command()
def vote(name: Name, profile: Profile = "tiny") -> None:
    """Open the voting arena: blind pairs of samples, three questions each, on loopback."""
    from evaluation.apps.arena import serve

    with problems():
        session = Session.open(name, profile, Watch())
        serve(session.settings, session.recipe.id, show.facts_of(session.walk, (name, "samples")))


@corpus.command("sample")
def corpus_sample() -> None:
    """Bring real footage to the workspace: Big Buck Bunny and live-action clips, by sha256, with their licences."""
    with problems():
        _sample(Settings())


@corpus.command("add")
def corpus_add(
    path: Annotated[Path, typer.Argument(help="A folder of videos, or a CSV with columns path[,text,licence,source].")],
    name: Annotated[str, typer.Option(help="Corpus to add to, made if it is new.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier of the footage's licence.")],
    source: Annotated[str, typer.Option(help="Where the footage came from.")] = "",
) -> None:
    """Add your own footage as a new shard of a corpus; nothing is copied, files are probed when materialised."""
    from ml.curation.sources import add_corpus

    with problems():
        settings = Settings()
        shard = add_corpus(settings.space, path, name, licence, source or str(path))
        show.console.print(f"corpus {name}: shard {shard}, next: name it in a recipe's corpus.names", highlight=False)


@corpus.command("list")
def corpus_list() -> None:
    """List the corpora of the workspace and their shards."""
    space = Settings().space
    for folder in sorted((space.root / "corpora").glob("*")):
        show.console.print(f"{folder.name}: {', '.join(space.shards(folder.name)) or 'no shards'}", highlight=False)


@dataset.command("list")
def dataset_list() -> None:
    """List the dataset versions that were frozen."""
    with problems():
        for revision in _repo().revisions():
            show.console.print(f"{revision.name}  {revision.commit[:12]}  {revision.message}", highlight=False)


@dataset.command("checkout")
def dataset_checkout(
    revision: Annotated[str, typer.Argument(help="A version that `opensora dataset list` shows.")],
    folder: Annotated[Path, typer.Argument(help="Where to put the files; must not exist yet.")],
) -> None:
    """Restore a frozen dataset version, byte for byte, from the configured remote."""
    with problems():
        _repo().checkout(revision, folder)
        show.console.print(f"{revision} restored in {folder}", highlight=False)


def _unmet(recipe: Recipe) -> list[str]:
    """What a recipe asks for that this installation does not have."""
    uris = {"autoencoder": recipe.autoencoder.weights_uri}
    uris["pretrained"] = recipe.pretrained.uri if recipe.pretrained else None
    missing = {part: uri for part, uri in uris.items() if uri and not (Settings().workspace / uri).exists()}
    return [f"{part}: {uri} is not in the workspace" for part, uri in missing.items()]


def _sample(settings: Settings) -> None:
    from ml.curation.sources import fetch_sample

    show.console.print("Footage …", highlight=False)
    fetch_sample(settings.space)


def _bill(session: Session) -> Table:
    rows = recipe_rows(session.runner.tracker, session.recipe)
    table = plan_beside_bill(plan_of(session.recipe), rows)
    return show.bill_table(table, totals(rows, session.recipe))


def _repo() -> DataRepo:
    settings = Settings()
    return DataRepo(settings.space.data_repo, settings.dvc_remote)


if __name__ == "__main__":
    app()
