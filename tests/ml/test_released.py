"""Import of released weights: what fits becomes a step that can be used as it is, else it is refused by name."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.tracking import RunLog, Tracker
from ml.entry import Call, CallError
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.networks import build_network
from ml.models.official.files import OfficialError
from ml.models.weights import Origin
from ml.recipe import Recipe
from ml.released import import_autoencoder, import_transformer, source_fingerprint
from ml.sample import make_samples, measure_losses

URI = "weights/released.safetensors"


@pytest.fixture
def call(tmp_path: Path, tiny_recipe: Recipe) -> Call:
    document = tiny_recipe.model_dump(mode="json")
    document["autoencoder"].update(weights_uri=URI, latent={"scale": 0.5})
    (tmp_path / "weights").mkdir()
    (tmp_path / "out").mkdir()
    recipe = Recipe.validate_document(document, "r")
    return Call("autoencoder", recipe, tmp_path, tmp_path / "out", {}, {}, RunLog())


def test_released_weights_become_a_step_with_their_digest(call: Call) -> None:
    torch.manual_seed(0)
    section = call.recipe.autoencoder
    source = build_autoencoder(section.net, section.latent)
    save_file(source.net.state_dict(), call.workspace / URI)
    import_autoencoder(call)
    loaded = load_autoencoder(call.out, section, call.recipe.id)
    video = torch.randn(1, 3, 5, 32, 32).clamp(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval().encode(video), source.eval().encode(video))
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert len(result["facts"]["source_sha256"]) == 64
    assert result["metrics"]["num_parameters"] == sum(t.numel() for t in source.net.state_dict().values())


def test_a_missing_file_says_where_to_put_it(call: Call) -> None:
    with pytest.raises(CallError, match=r"names weights/released\.safetensors, which is not in .*: place it there"):
        import_autoencoder(call)


def test_weights_of_another_network_are_refused(call: Call) -> None:
    save_file({"encoder.conv_in.conv.weight": torch.zeros(1)}, call.workspace / URI)
    with pytest.raises(OfficialError, match="does not fit v2_0-tiny's autoencoder"):
        import_autoencoder(call)
    assert not (call.out / "result.json").exists()


# --- transformers -------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """A small recipe without stages, and the official file that it uses as it is."""
    pretrained = {"uri": URI, "licence": "Apache-2.0", "url": "https://a.b/c"}
    text = {"kind": "minilm", "max_tokens": 8, "context_dim": 384, "pooled_dim": 384}
    recipe = make_recipe(text=text, pretrained=pretrained, stages=[])
    torch.manual_seed(7)
    (tmp_path / "weights").mkdir()
    state = build_network(recipe.network).state_dict()
    save_file({name: torch.randn_like(tensor) * 0.05 for name, tensor in state.items()}, tmp_path / URI)
    return recipe


def test_a_recipe_without_stages_is_sampled_and_measured_with_released_weights(
    ready: Recipe, make_call: Callable[..., Call], make_latents: Callable[[Recipe], Path], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    imported = make_call("pretrained", ready, "pretrained")
    import_transformer(imported)
    kept, given = load_file(imported.out / "weights.safetensors"), load_file(tmp_path / URI)
    assert all(torch.equal(kept[name], given[name]) for name in given)
    facts = json.loads((imported.out / "result.json").read_text(encoding="utf-8"))["facts"]
    assert (facts["licence"], facts["url"], len(facts["source_sha256"])) == ("Apache-2.0", "https://a.b/c", 64)
    inputs: dict[str, Any] = {"latents": make_latents(ready), "checkpoint": imported.out}
    losses = make_call("losses", ready, "losses", inputs, stages="pretrained")
    measure_losses(losses)
    found = json.loads((losses.out / "losses.json").read_text(encoding="utf-8"))
    assert found["by_stage"] == {"pretrained": found["held_out"]}
    assert found["held_out"] != found["untrained"]
    autoencoder, prompts = tmp_path / "autoencoder", tmp_path / "prompts"
    net = ready.autoencoder.net
    save_autoencoder(autoencoder, build_autoencoder(net), net, Origin(ready.id, "released"))
    prompts.mkdir()
    (prompts / "prompts.json").write_text('["waves drift"]', encoding="utf-8")
    inputs = {"prompts": prompts, "autoencoder": autoencoder, "checkpoint": imported.out}
    samples = make_call("samples", ready, "samples", inputs)
    make_samples(samples)
    assert len(pd.read_parquet(samples.out / "samples.parquet")) == len(ready.evaluation.seeds)


def test_an_import_of_the_walk_is_an_external_model_with_its_licence(
    ready: Recipe, make_call: Callable[..., Call], tracker: Tracker
) -> None:
    from mlflow import MlflowClient

    call = replace(make_call("pretrained", ready), log=RunLog(tracker.uri))
    import_transformer(call)
    facts = json.loads((call.out / "result.json").read_text(encoding="utf-8"))["facts"]
    model = MlflowClient(tracker.uri, tracker.uri).get_logged_model(facts["mlflow_model"])
    assert model.name == f"opensora-{ready.id}-transformer"
    assert (model.tags["licence"], model.tags["source_url"]) == ("Apache-2.0", "https://a.b/c")
    assert model.tags["source_sha256"] == facts["source_sha256"]
    assert model.params["kind"] == "mmdit"


def test_a_licence_is_recorded_and_changes_no_data(ready: Recipe, make_call: Callable[..., Call]) -> None:
    versions = []
    for number, licence in enumerate(("", "MIT")):
        document = ready.model_dump(mode="json")
        document["pretrained"]["licence"] = licence
        call = make_call("pretrained", Recipe.validate_document(document, "r"), f"out{number}")
        import_transformer(call)
        assert json.loads((call.out / "import.json").read_text(encoding="utf-8"))["licence"] == licence
        versions.append(json.loads((call.out / "result.json").read_text(encoding="utf-8"))["data_version"])
    assert versions[0] == versions[1]


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_every_file_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    seen = [source_fingerprint(tmp_path, "weights")]
    (folder / "model").mkdir(parents=True)
    shard, index = folder / "model" / "a.safetensors", folder / "model" / "model.safetensors.index.json"
    shard.write_bytes(b"abc")
    seen.append(source_fingerprint(tmp_path, "weights"))
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}), encoding="utf-8")
    for uri in ("weights", "weights/model/model.safetensors.index.json", "weights/model/a.safetensors"):
        before = source_fingerprint(tmp_path, uri)
        assert before == source_fingerprint(tmp_path, uri)
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
        assert source_fingerprint(tmp_path, uri) != before, "same size, another time"
        seen.append(before)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_has_a_fingerprint_too(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, encoding="utf-8")
    assert len(source_fingerprint(tmp_path, index.name)) == 16
