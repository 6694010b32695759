"""`opensora weights`: what the verbs say, what they leave behind, and their exit codes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from infra.workspace import Workspace
from ml.models.networks import build_network
from ml.models.official.report import Entry, Report
from ml.recipe import Recipe
from orchestration import show
from orchestration.weights_cli import ROWS, app, report_table


@pytest.fixture(autouse=True)
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_store: Path) -> None:
    monkeypatch.setenv("OPENSORA_WORKSPACE", str(workspace.root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.console, "_width", 160)
    shutil.copy(empty_store, workspace.tracking_db)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A 2.0 network of the tiny profile, as a published file."""
    torch.manual_seed(0)
    path = tmp_path / "Open_Sora_v2.safetensors"
    save_file(build_network(Recipe.load("v2_0", "tiny").network).state_dict(), path)
    return path


def say(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_every_verb_teaches(verb: str) -> None:
    result = say(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_weights_go_in_and_out(official: Path, workspace: Workspace, tmp_path: Path) -> None:
    tiny = ("--recipe", "v2_0", "--profile", "tiny")
    result = say("import", official.name, *tiny, "--licence", "Apache-2.0", "--url", "https://a.b/c")
    assert result.exit_code == 0, result.output
    assert "130 used" in result.output
    (folder,) = (workspace.root / "weights").iterdir()
    assert folder.name in result.output
    assert "no licence" not in result.output
    again = say("import", official.name, *tiny)
    assert "no licence was given" in again.output
    out = say("export", str(folder), "--layout", "opensora", "--to", "out.safetensors")
    assert out.exit_code == 0, out.output
    before, after = load_file(official), load_file(tmp_path / "out.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_writes_nothing(official: Path, workspace: Workspace) -> None:
    result = say("import", official.name, "--recipe", "v2_0", "--profile", "tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "they fit" in result.output
    assert not (workspace.root / "weights").exists()


def test_weights_of_another_generation_exit_1_with_the_right_recipe(official: Path, workspace: Workspace) -> None:
    result = say("import", official.name, "--recipe", "v1_2", "--profile", "tiny")
    assert result.exit_code == 1
    assert "these look like 2.0's MMDiT; v1_2-tiny wants 1.2's STDiT-3" in result.output
    assert "double_blocks.*.img_mod.lin.weight" in result.output
    assert result.output.count("error") == 1
    assert not (workspace.root / "weights").exists()


def test_the_published_profile_is_what_is_wanted_unless_told(official: Path) -> None:
    result = say("import", official.name, "--recipe", "v2_0", "--dry-run")
    assert result.exit_code == 1
    assert "v2_0-paper has" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("nowhere.pth", "--recipe", "v2_0"), 1, "does not exist"),
        (("Open_Sora_v2.safetensors", "--recipe", "v2_O"), 2, "did you mean 'v2_0'"),
        (("Open_Sora_v2.safetensors", "--recipe", "v2_0", "--source", "pixart_alpha"), 1, "starts no mmdit"),
        (("Open_Sora_v2.safetensors", "--recipe", "v2_0", "--part", "discriminator"), 2, "autoencoder"),
        (("Open_Sora_v2.safetensors",), 2, "--recipe"),
    ],
)
def test_a_call_that_cannot_work_says_why(official: Path, arguments: tuple[str, ...], code: int, why: str) -> None:
    result = say("import", *arguments)
    assert result.exit_code == code, result.output
    assert why in result.output
    assert "Traceback" not in result.output


def test_a_folder_without_weights_cannot_be_exported(tmp_path: Path) -> None:
    result = say("export", str(tmp_path), "--to", "x.safetensors")
    assert result.exit_code == 1
    assert "holds no finished weights" in result.output


def test_long_reports_are_cut_and_say_so() -> None:
    entries = tuple(Entry(f"name{i}", "refused", "unknown name") for i in range(ROWS + 5))
    table = report_table(Report(entries, "", "opensora"))
    assert table.row_count == ROWS
    assert table.caption == "and 5 more rows"


def test_names_with_brackets_are_shown_as_they_are() -> None:
    with show.console.capture() as said:
        show.console.print(report_table(Report((Entry("a[red]", "refused", "[2, 3]"),), "", "opensora")))
    assert "a[red]" in said.get()
    assert "[2, 3]" in said.get()
