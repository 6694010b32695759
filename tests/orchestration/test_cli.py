"""The command line: what each verb says, and exit codes that mean something."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infra.workspace import Workspace
from orchestration import show
from orchestration.cli import app


@pytest.fixture(autouse=True)
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENSORA_WORKSPACE", str(workspace.root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.console, "_width", 200)


def say(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("verb", ["recipes", "check", "plan", "demo", "run", "status", "costs", "report", "ui", "vote"])
def test_every_verb_teaches(verb: str) -> None:
    result = say(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_recipes_are_listed_with_what_they_are() -> None:
    assert "11.89B MMDiT" in say("recipes").output


def test_a_recipe_is_checked_with_its_header() -> None:
    result = say("check", "v2_0", "--profile", "paper")
    assert result.exit_code == 0
    assert "Exact command" in result.output


def test_what_is_missing_for_a_recipe_is_said_and_only_then() -> None:
    assert "hunyuan_vae.safetensors is not in the workspace" in say("check", "v2_0", "--profile", "paper").output
    assert "warning" not in say("check", "v2_0", "--profile", "tiny").output


@pytest.mark.parametrize(
    "arguments", [("--job", "typo"), ("--select", "typo"), ("--job", "curate", "--select", "shots")]
)
def test_an_unknown_job_or_asset_exits_2(arguments: tuple[str, ...]) -> None:
    result = say("run", "v2_0", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_the_plan_stands_beside_the_published_figures() -> None:
    output = say("plan", "v2_0", "--profile", "paper").output
    for published in ("2,240", "384", "1,536", "107,500", "18,400", "73,700"):
        assert published in output


def test_a_misspelt_recipe_exits_2_and_names_the_nearest() -> None:
    result = say("plan", "v2_O")
    assert result.exit_code == 2
    assert "did you mean 'v2_0'" in result.output


def test_a_recipe_without_a_report_says_how_to_get_one() -> None:
    result = say("report", "v2_0")
    assert result.exit_code == 2
    assert "opensora demo --recipe v2_0" in result.output


def test_the_status_of_an_empty_workspace_is_missing_everywhere() -> None:
    result = say("status", "v2_0")
    assert result.exit_code == 0
    assert "v2_0/release" in result.output
    assert "up to date" not in result.output


def test_an_empty_corpus_stops_a_run_with_the_way_out() -> None:
    result = say("run", "v2_0", "--job", "curate")
    assert result.exit_code == 1
    assert "opensora corpus" in result.output


def test_footage_is_added_and_listed(make_video: "object", tmp_path: Path) -> None:
    (tmp_path / "takes").mkdir()
    make_video(tmp_path / "takes" / "a.mp4")  # type: ignore[operator]  # the factory fixture
    added = say("corpus", "add", "takes", "--name", "mine", "--licence", "CC0-1.0")
    assert added.exit_code == 0, added.output
    assert say("corpus", "list").output.startswith("mine: ")


@pytest.mark.parametrize(
    ("path", "why"), [("nowhere", "nowhere"), ("empty", "no video")], ids=["missing folder", "empty folder"]
)
def test_footage_that_is_not_there_is_refused(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    result = say("corpus", "add", path, "--name", "mine", "--licence", "CC0-1.0")
    assert result.exit_code == 1
    assert why in result.output


def test_an_unknown_dataset_version_is_refused(tmp_path: Path) -> None:
    result = say("dataset", "checkout", "v2_0-tiny/nothing", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert "no dataset version" in result.output


def test_an_unreachable_store_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_TRACKING_URI", "http://127.0.0.1:1")
    result = say("costs", "v2_0")
    assert result.exit_code == 1
    assert "TrackingError" in result.output
    assert "Traceback" not in result.output
