"""Keys and staleness: what a change makes stale, and what it leaves alone."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from assets.steps import Function, Made, Step, StepError, Walk
from infra.settings import Settings
from infra.workspace import Workspace
from ml.entry import Call
from ml.recipe import Recipe, RecipeError
from orchestration.resources import walk_of


def finish(walk: Walk, step: Step, partition: str = "") -> Made:
    """Pretend that a step ran: its folder, its result, its pointer."""
    inputs = walk.inputs(step, partition)
    key = walk.key(step, partition, inputs)
    folder = walk.workspace.step(step.path(partition), key)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"data_version": f"data of {step.path(partition)} {key}", "metrics": {}, "facts": {}, "pictures": []}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    made = walk.finished(step, partition, key)
    assert made
    walk.point(step, partition, made)
    return made


@pytest.fixture
def built(workspace: Workspace) -> Callable[[Recipe], Walk]:
    """A walk whose every step has been made, in a workspace with one shard."""
    shard = workspace.shard_list("sample", "film")
    shard.parent.mkdir(parents=True)
    shard.write_text("path,source,licence,text\nfilm.mp4,test,CC0-1.0,\n", encoding="utf-8")

    def build(recipe: Recipe) -> Walk:
        walk = walk_of([recipe], Settings(workspace=workspace.root, tracking_uri="sqlite://"))
        return Walk({key: step for key, step in walk.steps.items() if step.name != "cost_report"}, workspace)

    return build


def make_all(walk: Walk) -> None:
    for step in walk.steps.values():
        for partition in walk.partitions(step) if step.partitioned else [""]:
            finish(walk, step, partition)


def stale(walk: Walk) -> set[str]:
    states = {
        step.name: walk.state(step, partition)
        for step in walk.steps.values()
        for partition in (walk.partitions(step) if step.partitioned else [""])
    }
    assert "missing" not in states.values()
    return {name for name, state in states.items() if state == "stale"}


def changed(recipe: Recipe, edit: Callable[[dict[str, Any]], None]) -> Recipe:
    document = recipe.model_dump(mode="json")
    edit(document)
    return Recipe.validate_document(document, "changed")


def test_a_finished_walk_is_up_to_date(built: Callable[[Recipe], Walk], tiny_recipe: Recipe) -> None:
    walk = built(tiny_recipe)
    make_all(walk)
    assert stale(walk) == set()


def test_a_threshold_makes_filtering_onward_stale_and_nothing_above(
    built: Callable[[Recipe], Walk], tiny_recipe: Recipe
) -> None:
    make_all(built(tiny_recipe))

    def relax(document: dict[str, Any]) -> None:
        document["curation"]["keep"]["thresholds"]["motion"]["min"] = 0.001

    after = stale(built(changed(tiny_recipe, relax)))
    assert {"curated", "captions", "dataset_version", "latents", "dit_stage1", "samples", "release"} <= after
    assert not after & {"sample", "shots", "clips", "scores", "prompts", "lpips_alex", "cost_plan"}


def test_the_gate_recuts_no_clip_and_retrains_nothing(built: Callable[[Recipe], Walk], tiny_recipe: Recipe) -> None:
    make_all(built(tiny_recipe))

    def tighten(document: dict[str, Any]) -> None:
        document["evaluation"]["gate"][0]["at_most"] = 0.5

    assert stale(built(changed(tiny_recipe, tighten))) == {"report", "release"}


def test_a_price_changes_no_checkpoint(built: Callable[[Recipe], Walk], tiny_recipe: Recipe) -> None:
    make_all(built(tiny_recipe))

    def dearer(document: dict[str, Any]) -> None:
        document["stages"][0]["compute"]["price"] = "h200-od-2026"
        document["stages"][0]["utilisation"] = 0.2

    assert stale(built(changed(tiny_recipe, dearer))) == {"cost_plan"}


def test_a_later_stage_leaves_the_earlier_ones_alone(built: Callable[[Recipe], Walk], tiny_recipe: Recipe) -> None:
    make_all(built(tiny_recipe))

    def longer(document: dict[str, Any]) -> None:
        document["stages"][2]["steps"] += 1

    after = stale(built(changed(tiny_recipe, longer)))
    assert "dit_stage3" in after
    assert not after & {"dit_stage1", "dit_stage2", "latents", "vae_stage1"}


def test_new_footage_is_a_new_shard_and_a_changed_list_is_stale(
    built: Callable[[Recipe], Walk], tiny_recipe: Recipe, workspace: Workspace
) -> None:
    walk = built(tiny_recipe)
    make_all(walk)
    shots = walk.step(("v2_0", "shots"))
    workspace.shard_list("sample", "second").write_text(
        "path,source,licence,text\nb.mp4,t,CC0-1.0,\n", encoding="utf-8"
    )
    assert walk.partitions(shots) == ["sample.film", "sample.second"]
    assert walk.state(shots, "sample.film") == "up to date"
    assert walk.state(shots, "sample.second") == "missing"
    workspace.shard_list("sample", "film").write_text("path,source,licence,text\nc.mp4,t,CC0-1.0,\n", encoding="utf-8")
    assert walk.state(shots, "sample.film") == "stale"


def released(document: dict[str, Any]) -> None:
    """Start from released weights, of the transformer and of the autoencoder."""
    document["pretrained"] = {"uri": "weights/dit.safetensors"}
    document["autoencoder"].update(weights_uri="weights/vae", stages=[], latent={"scale": 0.5})


def test_other_released_weights_make_the_import_and_everything_after_it_stale(
    built: Callable[[Recipe], Walk], tiny_recipe: Recipe, workspace: Workspace
) -> None:
    walk = built(changed(tiny_recipe, released))
    dit, vae = workspace.root / "weights" / "dit.safetensors", workspace.root / "weights" / "vae" / "a.pth"
    vae.parent.mkdir(parents=True)
    for path in (dit, vae):
        path.write_bytes(b"weights")
    make_all(walk)
    assert stale(walk) == set()
    dit.write_bytes(b"another")
    os.utime(dit, ns=(0, dit.stat().st_mtime_ns + 1_000_000))  # a coarse clock must not hide the change
    after = stale(walk)
    assert {"pretrained", "dit_stage1", "dit_stage3", "samples", "loss_report", "release"} <= after
    assert not after & {"autoencoder", "latents", "dataset_version", "reconstruction_report"}
    vae.write_bytes(b"longer weights")
    assert {"autoencoder", "latents", "reconstruction_report"} <= stale(walk)


def test_a_recipe_without_stages_samples_judges_and_releases_its_pretrained_weights(
    built: Callable[[Recipe], Walk], tiny_recipe: Recipe
) -> None:
    recipe = changed(tiny_recipe, lambda document: (released(document), document.update(stages=[]))[0])
    walk = built(recipe)
    make_all(walk)
    assert stale(walk) == set()
    assert not [step.name for step in walk.steps.values() if step.name.startswith("dit_")]
    for name in ("samples", "loss_report", "report", "release"):
        assert walk.step(("v2_0", name)).inputs["checkpoint"] == (("v2_0", "pretrained"),)
    losses = walk.step(("v2_0", "loss_report"))
    assert losses.options == {"stages": "pretrained"}
    assert "of the released weights beside the untrained" in losses.description


def test_a_recipe_needs_stages_or_pretrained_weights(tiny_recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="give a training stage, or pretrained weights"):
        changed(tiny_recipe, lambda document: document.update(stages=[]))


@pytest.mark.parametrize(
    ("name", "solver", "loss"), [("v1_0", "DDPM", "noise-prediction"), ("v2_0", "Euler", "flow-matching")]
)
def test_descriptions_say_what_is_solved_and_measured(
    built: Callable[[Recipe], Walk], name: str, solver: str, loss: str
) -> None:
    recipe = Recipe.load(name, "tiny")
    steps = built(recipe).steps
    assert f"{recipe.sampling.steps} {solver} steps" in steps[name, "samples"].description
    assert f"Held-out {loss} loss of every stage" in steps[name, "loss_report"].description


def test_a_missing_input_is_named(built: Callable[[Recipe], Walk], tiny_recipe: Recipe) -> None:
    walk = built(tiny_recipe)
    with pytest.raises(StepError, match=r"v2_0/curated reads v2_0/clips \(shard sample\.film\)"):
        walk.inputs(walk.step(("v2_0", "curated")), "")


def test_a_re_evaluation_stays_up_to_date_until_something_changes(workspace: Workspace) -> None:
    def nothing(call: Call) -> None:
        call.finish({})

    step = Step(("r", "samples"), "judgement", "", Function(nothing), "eval")
    walk = Walk({step.key: step}, workspace)
    key = walk.key(step, "", {}, fresh="monday")
    assert key != walk.key(step, "", {})
    folder = workspace.step(step.path(), key)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"data_version": "x"}', encoding="utf-8")
    made = walk.finished(step, "", key, fresh="monday")
    assert made
    walk.point(step, "", made)
    assert walk.state(step) == "up to date"
