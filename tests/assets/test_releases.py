"""Release: registered with provenance, champion only through the gate."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from assets.releases import release, training_run
from evaluation.report import Protocol, Report
from infra.registry import Registry
from infra.runs import Status, Tag
from infra.tracking import RunLog, Tracker
from ml.entry import Call
from ml.recipe import Recipe

NAME = "opensora-v2_0-tiny"
GOOD = {
    "loss/held_out": 0.5,
    "loss/untrained": 1.0,
    "reconstruction/psnr": 20.0,
    "reconstruction/psnr_mean_frame": 12.0,
    "vbench/temporal_flickering": 0.95,
}


@pytest.fixture
def call_with(tmp_path: Path, tiny_recipe: Recipe, tracker: Tracker, protocol: Protocol) -> Callable[..., Call]:
    """Factory of calls whose report has these metrics, on a checkpoint that a finished run made."""
    folders = {name: tmp_path / name for name in ("report", "abc123", "dataset", "out")}
    for folder in folders.values():
        folder.mkdir()
    trained = tracker.open("opensora/v2_0-tiny", "v2_0-tiny/dit_stage3", {Tag.STEP_KEY: "abc123"})
    tracker.close(trained, Status.FINISHED)
    (folders["dataset"] / "revision.json").write_text(json.dumps({"dvc_revision": "v/1"}), encoding="utf-8")

    def make(weights: bytes = b"weights", **metrics: float) -> Call:
        (folders["abc123"] / "weights.safetensors").write_bytes(weights)
        report = Report("c", protocol, GOOD | {k.replace("__", "/"): v for k, v in metrics.items()}, {}, {})
        (folders["report"] / "report.json").write_text(report.as_json(), encoding="utf-8")
        inputs = {"report": (folders["report"],), "checkpoint": (folders["abc123"],), "dataset": (folders["dataset"],)}
        call = Call("release", tiny_recipe, tmp_path, folders["out"], inputs, {}, RunLog())
        return replace(call, log=RunLog(tracker.uri, tracker.open("opensora/v2_0-tiny", "v2_0-tiny/release")))

    return make


def test_the_gate_makes_the_champion(call_with: Callable[..., Call], tracker: Tracker) -> None:
    call = call_with()
    release(call, tracker.uri)
    call.log.close()
    champion = Registry(tracker.uri).by_alias(NAME, "champion")
    assert champion
    assert set(champion.aliases) == {"candidate", "champion"}
    assert tracker.get(champion.run_id).name == "v2_0-tiny/dit_stage3", "the source run is the one that trained it"
    record = json.loads((call.out / "release.json").read_text(encoding="utf-8"))
    assert (record["gate"], record["dataset"], record["version"]) == ("passed", "v/1", 1)


def test_a_failing_gate_leaves_the_champion_alone(call_with: Callable[..., Call], tracker: Tracker) -> None:
    for weights, loss in ((b"good", 0.5), (b"worse", 0.99)):
        call = call_with(weights, loss__held_out=loss)
        release(call, tracker.uri)
        call.log.close()
    registry = Registry(tracker.uri)
    champion, candidate = (registry.by_alias(NAME, alias) for alias in ("champion", "candidate"))
    assert champion
    assert candidate
    assert (champion.version, candidate.version) == (1, 2)


def test_a_checkpoint_that_no_run_made_is_refused(tracker: Tracker, tiny_recipe: Recipe) -> None:
    with pytest.raises(LookupError, match="no finished run with step key nobody"):
        training_run(tracker, tiny_recipe, "nobody")
