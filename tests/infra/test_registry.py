"""The whole chain on a real store: weights outside, external model, version, alias, metric, search."""

from dataclasses import replace
from pathlib import Path

import pytest

from infra.registry import CANDIDATE, CHAMPION, Checkpoint, Imported, ModelVersion, Registry, RegistryError
from infra.tracking import Tracker


@pytest.fixture
def registry(tracker: Tracker) -> Registry:
    return Registry(tracker.uri)


@pytest.fixture
def checkpoint(tracker: Tracker, tmp_path: Path) -> Checkpoint:
    run_id = tracker.open("v2_0-tiny", "dit_stage1")
    uri = (tmp_path / "weights.safetensors").as_uri()
    return Checkpoint("v2_0-tiny", run_id, uri, "ab" * 32, {"width": 64}, {"stage": "stage1"}, step=40)


def another(checkpoint: Checkpoint, sha256: str) -> Checkpoint:
    return Checkpoint(checkpoint.name, checkpoint.run_id, checkpoint.weights_uri, sha256)


def test_nothing_is_registered_at_first(registry: Registry) -> None:
    assert registry.versions("v2_0-tiny") == []
    assert registry.by_alias("v2_0-tiny", CHAMPION) is None


def test_a_checkpoint_becomes_a_version_that_points_to_its_weights(registry: Registry, checkpoint: Checkpoint) -> None:
    version = registry.register(checkpoint)
    assert (version.name, version.version, version.run_id) == ("v2_0-tiny", 1, checkpoint.run_id)
    assert (version.weights_uri, version.sha256) == (checkpoint.weights_uri, "ab" * 32)
    assert version.tags["stage"] == "stage1"
    assert registry.versions("v2_0-tiny") == [version]


def test_the_model_behind_a_version_is_external_and_belongs_to_its_run(
    registry: Registry, tracker: Tracker, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    version = registry.register(checkpoint)
    client = MlflowClient(tracker.uri, tracker.uri)
    model = client.get_logged_model(version.model_id)
    assert (str(model.status), model.source_run_id) == ("READY", checkpoint.run_id)
    assert (model.params, model.tags["mlflow.model.isExternal"]) == ({"width": "64"}, "true")
    outputs = client.get_run(checkpoint.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(version.model_id, 40)]
    assert client.get_model_version("v2_0-tiny", "1").source == f"models:/{version.model_id}"
    kept = [path.name for path in (tmp_path / "workspace" / "mlartifacts").rglob("*") if path.is_file()]
    assert kept == ["MLmodel"]


def test_a_retried_step_registers_nothing_twice(registry: Registry, checkpoint: Checkpoint) -> None:
    first = registry.register(checkpoint)
    assert registry.register(checkpoint) == first
    assert registry.register(another(checkpoint, "cd" * 32)).version == 2
    assert [version.version for version in registry.versions("v2_0-tiny")] == [1, 2]


def test_an_alias_moves_from_version_to_version(registry: Registry, checkpoint: Checkpoint) -> None:
    for digest in ("ab" * 32, "cd" * 32):
        registry.register(another(checkpoint, digest))
    registry.set_alias("v2_0-tiny", CHAMPION, 1)
    moved = registry.set_alias("v2_0-tiny", CHAMPION, 2)
    registry.set_alias("v2_0-tiny", CANDIDATE, 2)
    assert moved.aliases == (CHAMPION,)
    assert [version.aliases for version in registry.versions("v2_0-tiny")] == [(), (CANDIDATE, CHAMPION)]
    found = registry.by_alias("v2_0-tiny", CHAMPION)
    assert isinstance(found, ModelVersion)
    assert found.version == 2
    registry.drop_alias("v2_0-tiny", CHAMPION)
    assert registry.by_alias("v2_0-tiny", CHAMPION) is None


def test_an_alias_never_points_to_a_version_that_does_not_exist(registry: Registry, checkpoint: Checkpoint) -> None:
    registry.register(checkpoint)
    with pytest.raises(RegistryError, match=r"has no version 7; it has \[1\]"):
        registry.set_alias("v2_0-tiny", CHAMPION, 7)
    with pytest.raises(RegistryError, match="it has none"):
        registry.set_alias("v1_2-tiny", CHAMPION, 1)


def test_the_reasons_of_a_gate_stay_with_the_version(registry: Registry, checkpoint: Checkpoint) -> None:
    registry.register(checkpoint)
    assert registry.tag("v2_0-tiny", 1, {"gate": "passed", "cost_usd": 1.5}).tags["cost_usd"] == "1.5"


def test_checkpoints_are_found_by_their_scores(registry: Registry, tracker: Tracker, checkpoint: Checkpoint) -> None:
    from mlflow import MlflowClient

    version = registry.register(checkpoint)
    evaluation = tracker.open("v2_0-tiny", "report")
    registry.score(version, evaluation, {"vbench/total": 0.81}, step=40)
    client = MlflowClient(tracker.uri, tracker.uri)
    experiment_id = client.get_run(evaluation).info.experiment_id
    for bound, expected in (("> 0.8", [version.model_id]), ("> 0.9", [])):
        found = client.search_logged_models([experiment_id], f"metrics.`vbench/total` {bound}")
        assert [model.model_id for model in found] == expected
    assert tracker.get(evaluation).metrics["vbench/total"] == 0.81


def test_a_run_that_does_not_exist_registers_nothing(registry: Registry, checkpoint: Checkpoint) -> None:
    with pytest.raises(RegistryError, match="cannot register v2_0-tiny of run nope"):
        registry.register(Checkpoint("v2_0-tiny", "nope", checkpoint.weights_uri, "ab" * 32))
    assert registry.versions("v2_0-tiny") == []


def test_the_global_state_of_mlflow_is_put_back(registry: Registry, checkpoint: Checkpoint) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    registry.register(checkpoint)
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_imported_weights_are_an_external_model_of_no_run(registry: Registry, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = (tmp_path / "it's here.safetensors").as_uri()
    imported = Imported("v1_2-paper", uri, "ab" * 32, "it's.pth", "cd" * 32, "https://a.b/c?d=1", "MIT", {"kind": "x"})
    client = MlflowClient(registry.uri, registry.uri)
    model = client.get_logged_model(registry.record(imported))
    assert (model.name, str(model.status), model.tags["mlflow.model.isExternal"]) == ("v1_2-paper", "READY", "true")
    assert not model.source_run_id
    assert model.params == {"kind": "x"}
    known = {key: value for key, value in model.tags.items() if not key.startswith("mlflow.")}
    assert known == {
        "weights_uri": uri,
        "sha256": "ab" * 32,
        "source": "it's.pth",
        "source_sha256": "cd" * 32,
        "source_url": "https://a.b/c?d=1",
        "licence": "MIT",
    }


def test_the_same_import_is_recorded_once(registry: Registry) -> None:
    imported = Imported("v1_2-paper", "file:///w", "ab" * 32, "w.pth", "cd" * 32)
    first = registry.record(imported)
    assert registry.record(imported) == first
    assert registry.record(replace(imported, licence="MIT")) != first
    assert registry.record(replace(imported, name="v1_2-tiny")) != first


def test_a_record_that_cannot_be_made_is_named(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="cannot record a/b"):
        registry.record(Imported("a/b", "file:///w", "ab" * 32, "w.pth", "cd" * 32))
