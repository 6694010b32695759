"""What the asset page shows."""

import json
from pathlib import Path

import dagster as dg
import numpy as np
from PIL import Image

from assets.factory import metadata, picture, to_asset
from assets.steps import Entry, Function, Made, Step, Walk
from assets.tasks import Done, Runner
from infra.compute.local import LocalLauncher
from infra.settings import Settings
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.entry import Call
from ml.recipe import Recipe


def write(call: Call) -> None:
    Image.new("RGB", (8, 8), "red").save(call.out / "sheet.png")
    call.finish({"clips": 3}, facts={"who": "me", "rows": [1]}, pictures=["sheet.png"], data=[])


def asset_of(recipe: Recipe) -> Step:
    return Step((recipe.name, "one"), "curation", "What it is.", Function(write, billed=False), "data", recipe)


def test_numbers_facts_and_pictures_reach_the_page(workspace: Workspace, tracker: Tracker, tiny_recipe: Recipe) -> None:
    step = asset_of(tiny_recipe)
    runner = Runner(Walk({step.key: step}, workspace), LocalLauncher(), tracker, Settings(workspace=workspace.root))
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([to_asset(step)], instance=instance, resources={"runner": runner})
        (event,) = result.asset_materializations_for_node("v2_0__one")
    shown = event.metadata
    assert shown["clips"].value == 3.0
    assert shown["who"].value == "me"
    assert shown["rows"].value == [1]
    assert str(shown["sheet"].value).startswith("![sheet](data:image/png;base64,")
    assert shown["reused"].value is False
    assert event.tags is not None
    made = runner.walk.current(step)
    assert made
    assert event.tags["dagster/data_version"] == made.data_version


def test_a_picture_that_would_swell_the_log_is_made_smaller(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    noise = np.random.default_rng(0).integers(0, 255, (900, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    text = str(picture(path).value)
    assert text.startswith("![big](data:image/jpeg;base64,")
    assert len(text) < path.stat().st_size


def test_a_run_is_linked(workspace: Workspace, tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.open("e", "n")
    result = {"metrics": {}, "facts": {}, "pictures": [], "data_version": "x"}
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    runner = Runner(Walk({}, workspace), LocalLauncher(), tracker, Settings(workspace=workspace.root))
    shown = metadata(Done(Made("p", "k", tmp_path, result, run), reused=True, cost_usd=0.0), runner)
    assert run in shown["mlflow_run"].value


def test_a_task_names_its_module_and_its_hardware(tiny_recipe: Recipe) -> None:
    step = Step(
        (tiny_recipe.name, "clips"), "curation", "d", Entry("ml.curate", "clips", tiny_recipe.compute.curate), "data"
    )
    asset = to_asset(step)
    shown = asset.metadata_by_key[asset.key]
    assert shown["command"] == "python -m ml.curate clips"
    assert "CPU:2" in shown["hardware"]
    (reference,) = shown["dagster/code_references"].code_references
    assert Path(reference.file_path).name == "curate.py"
