"""Import of released autoencoder weights: what fits becomes a step, anything else is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.tracking import RunLog
from ml.entry import Call, CallError
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder
from ml.models.official.files import OfficialError
from ml.recipe import Recipe
from ml.released import import_autoencoder

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
    with pytest.raises(CallError, match=r"weights/released\.safetensors.*place the released file there"):
        import_autoencoder(call)


def test_weights_of_another_network_are_refused(call: Call) -> None:
    save_file({"encoder.conv_in.conv.weight": torch.zeros(1)}, call.workspace / URI)
    with pytest.raises(OfficialError, match="does not fit v2_0-tiny's autoencoder"):
        import_autoencoder(call)
    assert not (call.out / "result.json").exists()
