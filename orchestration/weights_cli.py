"""`opensora weights`: officially released weights into the workspace, and ours out of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from infra.registry import Registry
from infra.settings import Settings
from ml.architectures import Source
from ml.recipe import Recipe, user_folders
from orchestration import show
from orchestration.problems import problems, stop

if TYPE_CHECKING:  # torch takes seconds to import, and `opensora --help` must not
    from ml.models.official.report import Report

app = typer.Typer(
    help="Official weights: check and import them, export ours in the official layouts.", no_args_is_help=True
)

Options = TypeVar("Options")
COLOURS = {"converted": "cyan", "dropped": "dim", "initialised": "yellow", "refused": "red"}
ROWS = 40


@dataclass(frozen=True)
class ImportOptions:
    """What `import` can be told; every field is an argument or option of the command line."""

    file: Annotated[
        Path, typer.Argument(help="Weights file, index.json of shards, or a folder that holds one.", metavar="FILE")
    ]
    recipe: Annotated[str, typer.Option(help="Recipe whose network the weights are for.")]
    profile: Annotated[str, typer.Option(help="Profile of the recipe; `paper` has the published sizes.")] = "paper"
    part: Annotated[Literal["transformer", "autoencoder"], typer.Option(help="Network of the recipe.")] = "transformer"
    source: Annotated[
        Source,
        typer.Option(
            help="Layout of the file; `opensora_4ch` starts 1.3 from 1.2's weights, `opensora_ends` 2.0 on another "
            "autoencoder."
        ),
    ] = "auto"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compare names and shapes only; write nothing.")] = False
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")] = ""
    url: Annotated[str, typer.Option(help="Where the weights came from.")] = ""


def taking(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Let a verb take its options as one dataclass: typer reads them from the signature, one by one."""

    def wrap(verb: Callable[[Options], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            verb(options(**values))

        told: Any = call
        told.__signature__ = inspect.signature(options)
        told.__annotations__ = get_type_hints(options, include_extras=True)
        told.__doc__ = verb.__doc__
        return call

    return wrap


@app.command("import")
@taking(ImportOptions)
def import_(options: ImportOptions) -> None:
    """Check official weights name by name, convert them, and place them in the workspace with their origin."""
    from ml.weights import Wish, check_weights, import_weights

    with problems():
        recipe = Recipe.load(options.recipe, options.profile, user_folders())
        wish = Wish(options.file, recipe, options.part, options.source, options.licence, options.url)
        checked = check_weights(wish)
        show.console.print(checked.report.summary(), highlight=False, markup=False)
        if checked.report.groups():
            show.console.print(report_table(checked.report))
        if not checked.report.fits:
            stop(f"nothing was written: {checked.report.hint}", 1)
        if options.dry_run:
            show.console.print("[green]ok[/green] they fit; nothing was written (--dry-run)", highlight=False)
            return
        settings = Settings()
        placed = import_weights(wish, checked, settings.space, Registry(settings.tracking_uri))
        verb = "were there already" if placed.reused else "imported"
        show.console.print(f"[green]ok[/green] {verb}: {placed.folder}", highlight=False, soft_wrap=True)
        show.console.print(f"sha256 {placed.sha256}\nMLflow model {placed.model_id}", highlight=False)
        if not options.licence:
            show.console.print("[yellow]warning[/yellow] no licence was given (--licence)", highlight=False)


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="Folder with weights.safetensors and model.json.", metavar="FOLDER")],
    to: Annotated[Path, typer.Option(help="File to write (diffusers: folder to make).")],
    layout: Annotated[
        Literal["opensora", "flux", "diffusers"], typer.Option(help="Whose names and layout.")
    ] = "opensora",
) -> None:
    """Write a weights folder under the names that Open-Sora, FLUX.1 or diffusers read."""
    from ml.weights import export_weights

    with problems():
        for note in export_weights(folder, layout, to):
            show.console.print(f"  {note}", highlight=False, markup=False)
        show.console.print(f"[green]ok[/green] {to}", highlight=False)


def report_table(report: "Report") -> Table:
    """What was refused first, then initialised, dropped and converted; block numbers are folded to `*`."""
    rows = report.groups()
    more = f"and {len(rows) - ROWS} more rows" if len(rows) > ROWS else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=more)
    table.add_column("what", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("n", justify="right")
    table.add_column("how or why", overflow="fold")
    for status, name, how, number in rows[:ROWS]:
        table.add_row(f"[{COLOURS[status]}]{status}[/]", escape(name), str(number), escape(how))
    return table
