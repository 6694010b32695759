"""Recipes side by side: known figures of the generations, and measured ones only where a report says them."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from infra.workspace import Workspace
from ml.recipe import Recipe, RecipeError
from orchestration.compare import autoencoder_parameters, column, compare, num_evaluations, quantity


@pytest.fixture(autouse=True)
def _own_workspace(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENSORA_WORKSPACE", str(workspace.root))
    monkeypatch.chdir(tmp_path)


def text(table: Table) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def write_report(workspace: Workspace, recipe: Recipe, metrics: dict[str, float], absent: dict[str, str]) -> None:
    """A finished report step, as a walk leaves it behind."""
    step = workspace.root / "steps" / recipe.id / "report"
    (step / "abc").mkdir(parents=True)
    (step / "current.json").write_text(json.dumps({"key": "abc", "run_id": "", "fresh": ""}))
    (step / "abc" / "result.json").write_text(json.dumps({"facts": {}, "data_version": "0"}))
    (step / "abc" / "report.json").write_text(json.dumps({"id": "x", "metrics": metrics, "absent": absent}))


def test_five_generations_stand_side_by_side_without_a_workspace() -> None:
    names = ["v1_0", "v1_1", "v1_2", "v1_3", "v2_0", "v2_0_hc"]
    printed = text(compare(names, "paper"))
    for figure in ("760 M", "767 M", "1.21 G", "11.9 G", "84", "76,032", "18,432", "5.09 P", "199,600", "30x90x160"):
        assert figure in printed
    assert "v1_1-paper, v2_0_hc-paper: no GPU-days were published" in printed
    assert "no report in this workspace" in printed
    assert "do not compare" in printed


@pytest.mark.parametrize(("name", "rows"), [("v1_0", 200), ("v1_2", 60), ("v1_3", 50), ("v2_0", 80), ("v2_0_hc", 80)])
def test_evaluations_are_those_of_guidance_without_idle_rows(name: str, rows: int) -> None:
    assert num_evaluations(Recipe.load(name, "paper"), 33) == rows


def test_image_to_video_needs_more() -> None:
    recipe = Recipe.load("v2_0", "paper")
    sampling = recipe.sampling.model_copy(update={"condition": "i2v_head"})
    assert num_evaluations(recipe.model_copy(update={"sampling": sampling}), 33) == 110


@pytest.mark.parametrize(
    ("name", "millions"), [("v1_0", 83.65), ("v1_2", 393.3), ("v1_3", 259.0), ("v2_0", 246.5), ("v2_0_hc", 459)]
)
def test_autoencoders_are_counted_on_the_meta_device(name: str, millions: float) -> None:
    net = Recipe.load(name, "paper").autoencoder.net
    assert autoencoder_parameters(net) / 1e6 == pytest.approx(millions, rel=0.005)


def test_flops_of_a_sample_are_those_of_its_evaluations() -> None:
    """2.0: 80 evaluations of 5.09 PF; high compression needs a tenth of it."""
    rows = column(Recipe.load("v2_0", "paper")).rows
    assert (rows["FLOPs an evaluation"], rows["FLOPs a sample"]) == ("5.09 P", "407 P")
    assert column(Recipe.load("v2_0_hc", "paper")).rows["FLOPs a sample"] == "39.7 P"


def test_measured_rows_come_from_the_report(workspace: Workspace) -> None:
    recipe = Recipe.load("v2_0", "tiny")
    measured = {"loss/held_out": 0.8026, "reconstruction/psnr": 19.5, "vbench/temporal_flickering": 0.985}
    write_report(workspace, recipe, measured, {"vbench/total": "15 dimensions are absent"})
    found = column(recipe)
    assert found.rows["held-out loss"] == "0.8026"
    assert found.rows["VBench temporal_flickering"] == "0.9850"
    assert found.rows["VBench total"] == "-"
    assert "VBench total: 15 dimensions are absent" in found.reasons
    assert any("does not hold it" in reason for reason in found.reasons)
    printed = text(compare(["v1_2", "v2_0"], "tiny"))
    assert "0.8026" in printed
    assert "v1_2-tiny: no report in this workspace" in printed


def test_one_recipe_is_no_comparison() -> None:
    with pytest.raises(ValueError, match="two recipes"):
        compare(["v2_0", "v2_0"], "paper")
    with pytest.raises(RecipeError, match="v2_0"):
        compare(["v2_0", "v2_00"], "paper")


def test_quantities_have_three_digits() -> None:
    values = {0.5: "0.50", 7: "7.00", 999: "999", 12_300: "12.3 k", 5.0918e15: "5.09 P", 4.07e17: "407 P"}
    assert {value: quantity(value) for value in values} == values
