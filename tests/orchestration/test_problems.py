"""Errors become one message and an exit code that means something."""

import pytest
import typer

from ml.recipe import RecipeError
from orchestration import show
from orchestration.problems import problems, stop


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("no [recipe]"), 2), (ValueError("no [recipe]"), 1), (FileNotFoundError("no [recipe]"), 1)],
)
def test_an_error_leaves_with_its_code_and_words(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with show.console.capture() as said, pytest.raises(typer.Exit) as left, problems():
        raise error
    assert left.value.exit_code == code
    assert "no [recipe]" in said.get()


def test_errors_of_the_program_itself_are_not_hidden() -> None:
    with pytest.raises(AssertionError), problems():
        raise AssertionError


def test_a_verb_may_stop_by_itself() -> None:
    with show.console.capture() as said, pytest.raises(typer.Exit) as left, problems():
        stop("enough", 1)
    assert (left.value.exit_code, said.get()) == (1, "error enough\n")
