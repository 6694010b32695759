"""What goes wrong in a verb becomes one readable message and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from dagster import DagsterError
from rich.markup import escape

from ml.recipe import RecipeError
from orchestration.show import console


@contextmanager
def problems() -> Iterator[None]:
    """Turn the errors that the house raises into a message and an exit code: 2 for a recipe or call, 1 for the rest."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too, and already said
        raise
    except RecipeError as error:
        stop(str(error), 2)
    except (DagsterError, LookupError, RuntimeError, ValueError, OSError) as error:
        stop(f"{type(error).__name__}: {error}", 1)


def stop(message: str, code: int) -> None:
    """Print a message and leave with a code."""
    console.print(f"[red]error[/red] {escape(message)}", highlight=False)
    raise typer.Exit(code)
