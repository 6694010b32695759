"""`opensora train`: what it shows before anything starts, what it refuses and with which advice, and what it runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from assets.steps import Function, Step, Walk
from assets.tasks import Runner
from infra.compute.local import LocalLauncher
from infra.settings import Settings
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml import memory as m
from ml.entry import Call
from ml.recipe import Recipe
from ml.sections import AutoencoderStage
from orchestration import show
from orchestration.cli import app
from orchestration.train_cli import Look, refusal, run, stage_of


@pytest.fixture(autouse=True)
def here(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_store: Path) -> None:
    monkeypatch.setenv("OPENSORA_WORKSPACE", str(workspace.root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show.console, "_width", 160)
    workspace.tracking_db.write_bytes(empty_store.read_bytes())


def say(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)


def mine(folder: Path, **engine: object) -> None:
    """A user's recipe `mine`: 2.0's paper profile with another engine in its first stage."""
    document = Recipe.load("v2_0", "paper").model_dump(mode="json")
    document.pop("profile")
    document["name"] = "mine"
    document["stages"][0]["engine"].update(engine)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text(yaml.safe_dump({**document, "profiles": {"paper": {}}}))


def test_a_dry_run_shows_plan_and_memory_and_starts_nothing(workspace: Workspace) -> None:
    result = say("--recipe", "v2_0", "--profile", "paper", "--stage", "stage1", "--dry-run", "--batch-sizes")
    assert result.exit_code == 0, result.output
    for words in (
        "85,000",
        "224 ranks (colossal, zero2)",
        "activations of 13 x (768px, 1 f)",
        "available",
        "768px, 1 f",
    ):
        assert words in result.output
    assert not (workspace.root / "steps").exists()


@pytest.mark.parametrize("stage", ["stage1", "vae_stage1"])
def test_stages_of_both_kinds_are_looked_at(stage: str) -> None:
    result = say("--recipe", "v2_0", "--stage", stage, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "this machine" in result.output


def test_what_cannot_fit_is_refused_with_advice(tmp_path: Path) -> None:
    mine(tmp_path, kind="plain", sharding="none")
    asked = ("--recipe", "mine", "--profile", "paper", "--stage", "stage1")
    for more in ((), ("--dry-run",)):
        result = say(*asked, *more)
        assert result.exit_code == 2
        assert "stage1 cannot fit: 768px, 1 f takes" in result.output
        assert "sharding: zero2 (kind: colossal)" in result.output
        assert "--force starts it all the same" in result.output
    forced = say(*asked, "--force", "--dry-run")
    assert forced.exit_code == 0


def test_advice_is_only_what_helps(tmp_path: Path) -> None:
    recipe = Recipe.load("v2_0", "paper")
    whole = recipe.stages[0]
    stage = whole.model_copy(update={"engine": whole.engine.model_copy(update={"checkpoint_blocks": (0, 0)})})
    look = Look.at(recipe, stage)
    assert not look.fits
    assert "checkpoint_blocks: [100, 100], recompute: block" in refusal(look)
    assert "more devices" not in refusal(look)  # its activations alone are too much
    hopeless = replace(look, space=4.0 * m.GIB)
    assert "take devices with more memory" in refusal(hopeless)


def test_an_unknown_stage_is_told_the_known_ones() -> None:
    result = say("--recipe", "v2_0", "--stage", "stage9")
    assert result.exit_code == 2
    assert "its stages: vae_stage1, stage1, stage2, stage3" in result.output


def test_missing_inputs_are_named_and_nothing_is_spent(tracker: Tracker) -> None:
    result = say("--recipe", "v2_0", "--stage", "stage1")
    assert result.exit_code == 1
    assert "v2_0/dit_stage1 reads v2_0/latents, which has not been made yet" in result.output
    assert tracker.runs(None, "") == []


@pytest.mark.parametrize(("name", "asset"), [("stage2", "dit_stage2"), ("vae_stage1", "vae_stage1")])
def test_the_step_of_the_stage_is_run_and_no_other(
    name: str, asset: str, tiny_recipe: Recipe, workspace: Workspace, tracker: Tracker
) -> None:
    def write(call: Call) -> None:
        (call.out / "weights").write_text(call.op)
        call.finish({})

    steps = [Step((tiny_recipe.name, key), "g", "d", Function(write), "eval", tiny_recipe) for key in (asset, "other")]
    walk = Walk({step.key: step for step in steps}, workspace)
    stage = stage_of(tiny_recipe, name)
    assert isinstance(stage, AutoencoderStage) == name.startswith("vae")
    run(Runner(walk, LocalLauncher(), tracker, Settings(workspace=workspace.root)), tiny_recipe, stage)
    assert [walk.current(step) is not None for step in steps] == [True, False]
