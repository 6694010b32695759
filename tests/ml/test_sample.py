"""Sampling, held-out loss and reconstruction, with small untrained networks and the real MiniLM."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from ml.batching.video import read_clip
from ml.entry import Call, CallError
from ml.metrics import psnr
from ml.models.autoencoders.registry import build_autoencoder, save_autoencoder
from ml.models.lpips import LpipsError
from ml.models.networks import save_network
from ml.models.weights import Origin
from ml.recipe import Recipe
from ml.sample import make_samples, mean_frames, measure_losses, measure_reconstruction, requests_of
from ml.sample import still as repeated
from ml.sampling.requests import Request, RequestError
from ml.shapes import Size
from ml.training.networks import new_transformer

MINILM = {"kind": "minilm", "max_tokens": 12, "context_dim": 384, "pooled_dim": 384}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    """The small recipe with the text encoder it names."""
    return make_recipe(text=MINILM)


def save_transformer(recipe: Recipe, folder: Path, stage: str, seed: int) -> Path:
    """A transformer that says something: its zero-initialised layers are drawn from a seed too."""
    network = new_transformer(recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_network(folder, network, Origin(recipe.id, stage))
    return folder


@pytest.fixture(scope="module")
def networks(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a transformer and of an autoencoder."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    net = recipe.autoencoder.net
    save_autoencoder(root / "autoencoder", build_autoencoder(net), net, Origin(recipe.id, "vae_stage1"))
    return {
        "checkpoint": save_transformer(recipe, root / "checkpoint", "stage3", seed=1),
        "autoencoder": root / "autoencoder",
    }


@pytest.fixture
def call(make_call: Callable[..., Call], recipe: Recipe, networks: dict[str, Path], tmp_path: Path) -> Call:
    """Samples of two prompts."""
    (tmp_path / "prompts.json").write_text(json.dumps(["a red wave", "a quiet sea"]), encoding="utf-8")
    return make_call("samples", recipe, inputs={**networks, "prompts": tmp_path})


def test_samples_are_videos_with_a_table_and_a_sheet(call: Call) -> None:
    make_samples(call)
    rows = pd.read_parquet(call.out / "samples.parquet")
    assert list(rows.columns) == ["prompt", "prompt_index", "seed", "path", "frames", "height", "width", "fps"]
    assert rows[["prompt_index", "seed"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert rows["path"].tolist() == ["videos/0-0.mp4", "videos/0-1.mp4", "videos/1-0.mp4", "videos/1-1.mp4"]
    for row in rows.itertuples():
        clip = read_clip(call.out / row.path, None, Size(row.height, row.width))
        assert clip.shape == (row.frames, row.height, row.width, 3) == (5, 48, 80, 3)
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert result["pictures"] == ["contact_sheet.png"]
    assert set(rows["path"]) | {"samples.parquet"} == set(result["data"])
    # Three steps with two rows each: prompt and empty prompt; nothing is given, so no third row.
    assert result["metrics"]["evaluations"] == 6


def test_sampling_again_gives_the_same_bytes_and_keeps_what_is_there(call: Call) -> None:
    make_samples(call)
    version = json.loads((call.out / "result.json").read_text(encoding="utf-8"))["data_version"]
    kept = call.out / "videos" / "1-1.mp4"
    before = kept.stat().st_mtime_ns
    shutil.copy(call.out / "videos" / "0-0.mp4", call.out / "first.mp4")
    for name in ("0-0", "0-1"):
        (call.out / "videos" / f"{name}.mp4").unlink()
    make_samples(call)
    assert kept.stat().st_mtime_ns == before
    assert (call.out / "videos" / "0-0.mp4").read_bytes() == (call.out / "first.mp4").read_bytes()
    (call.out / "first.mp4").unlink()
    make_samples(call)
    assert json.loads((call.out / "result.json").read_text(encoding="utf-8"))["data_version"] == version


def test_prompts_come_from_a_folder_or_from_a_file_of_ones_own(call: Call, tmp_path: Path) -> None:
    assert requests_of(call) == [Request("a red wave"), Request("a quiet sea")]
    (tmp_path / "mine.json").write_text('["mine"]', encoding="utf-8")
    own = replace(call, options={"prompts": str(tmp_path / "mine.json")})
    assert requests_of(own) == [Request("mine")]
    (tmp_path / "mine.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RequestError, match="must hold a JSON list of prompts"):
        make_samples(own)


def test_a_request_with_a_picture_is_made_from_it(call: Call, tmp_path: Path) -> None:
    """Its references lie beside the file of prompts."""
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:, 40:] = 255
    cv2.imwrite(str(tmp_path / "half.png"), picture)
    entry = {"prompt": "a red wave", "references": ["half.png"], "condition": "i2v_head"}
    (tmp_path / "prompts.json").write_text(json.dumps([entry]), encoding="utf-8")
    make_samples(call)
    rows = pd.read_parquet(call.out / "samples.parquet")
    assert rows["prompt"].tolist() == ["a red wave"] * 2
    (tmp_path / "prompts.json").write_text(json.dumps([{**entry, "references": ["gone.png"]}]), encoding="utf-8")
    with pytest.raises(RequestError, match=r"gone\.png does not exist"):
        make_samples(call)


def test_losses_stand_beside_those_of_the_untrained_network(
    make_call: Callable[..., Call], mini: Recipe, latents: Path, tmp_path: Path
) -> None:
    folders = [save_transformer(mini, tmp_path / name, name, seed) for seed, name in enumerate(("stage1", "stage2"))]
    call = make_call("losses", mini, inputs={"latents": latents, "checkpoint": folders}, stages="stage1,stage2")
    measure_losses(call)
    found = json.loads((call.out / "losses.json").read_text(encoding="utf-8"))
    assert found["untrained"] == pytest.approx(2.0, rel=0.1)
    assert found["held_out"] == found["by_stage"]["stage2"] != found["by_stage"]["stage1"]
    assert found["timesteps"] == [0.25, 0.75]
    assert {name: len(values) for name, values in found["by_timestep"].items()} == {
        "untrained": 2,
        "stage1": 2,
        "stage2": 2,
    }
    assert set(found["by_bucket"]["stage1"]) == {"48x80/48x80/1", "48x80/48x80/5"}
    assert (found["num_clips"], found["num_latents"]) == (3, 6)
    assert (call.out / "losses.png").stat().st_size > 5000
    with pytest.raises(CallError, match="2 for"):
        measure_losses(replace(call, options={"stages": "stage1"}))


def test_reconstruction_stands_beside_its_baselines(
    make_call: Callable[..., Call], recipe: Recipe, networks: dict[str, Path], footage: Any
) -> None:
    made = make_call("reconstruct", recipe, inputs={"dataset": footage.dataset, "autoencoder": networks["autoencoder"]})
    call = replace(made, workspace=footage.workspace)
    measure_reconstruction(call)
    found = json.loads((call.out / "reconstruction.json").read_text(encoding="utf-8"))
    assert found["num_clips"] == 2
    assert (found["lpips"], found["lpips_reason"]) == (None, "no weights at cache/lpips/alex.safetensors")
    # An untrained autoencoder knows nothing; a clip's own mean frame knows much of slow footage.
    assert found["psnr"] < found["psnr_mean_frame"] < found["psnr_own_mean_frame"]
    assert -1 < found["ssim"] < 0.5
    assert (call.out / "reconstruction.png").stat().st_size > 2000
    given = replace(call, inputs={**call.inputs, "lpips": (footage.workspace / "lpips_alex",)})
    with pytest.raises(LpipsError, match="lpips_alex"):
        measure_reconstruction(given)


@pytest.mark.parametrize("name", ["v1_1", "v1_3"])
def test_losses_of_other_generations_are_those_of_their_process(
    make_call: Callable[..., Call], make_generation: Any, make_latents: Any, tmp_path: Path, name: str
) -> None:
    recipe = make_generation(name)
    folder = save_transformer(recipe, tmp_path / "one", "stage1", seed=1)
    call = make_call("losses", recipe, inputs={"latents": make_latents(recipe), "checkpoint": folder}, stages="stage1")
    measure_losses(call)
    found = json.loads((call.out / "losses.json").read_text(encoding="utf-8"))
    assert found["held_out"] != found["untrained"]
    assert np.isfinite(found["held_out"])
    if name == "v1_1":
        assert found["untrained"] == pytest.approx(1.0, rel=0.1), "a silent network has the noise's variance"


def test_the_mean_frame_is_the_mean_of_all_frames() -> None:
    dark, bright = np.full((4, 2, 2, 3), 40, np.uint8), np.full((4, 2, 2, 3), 80, np.uint8)
    means = mean_frames([dark, bright, np.full((4, 2, 4, 3), 90, np.uint8)], [(2, 2), (4, 2)])
    frame = means[2, 2]
    assert frame.tolist() == [[[60.0] * 3] * 2] * 2
    assert means[4, 2].tolist() == [[[70.0] * 3] * 2] * 4, "no clip is 4x2: the mean of all three, resized"
    assert psnr(dark, repeated(frame, dark)) == pytest.approx(20 * np.log10(255 / 20))
