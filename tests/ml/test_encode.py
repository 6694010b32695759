"""Encoding, with a real (untrained) autoencoder and the real MiniLM."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ml.batching.buckets import Bucketing
from ml.batching.datasets import ClipDataset, LatentDataset, to_video
from ml.encode import EncodeError, encode_latents, parts, plan_items, same_shape
from ml.entry import Call
from ml.manifest import LATENTS
from ml.models.autoencoders.hunyuan import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.weights import Origin
from ml.recipe import Recipe
from ml.shapes import Size

MINILM = {"kind": "minilm", "max_tokens": 12, "context_dim": 384, "pooled_dim": 384}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    """The small recipe with the text encoder it names."""
    return make_recipe(text=MINILM)


@pytest.fixture(scope="module")
def autoencoder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained autoencoder with a scale of 2."""
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder)
    network.scale = 2.0
    save_autoencoder(folder, network, Origin(recipe.id, "vae_stage1"))
    return folder


@pytest.fixture
def call(make_call: Callable[..., Call], recipe: Recipe, autoencoder: Path, footage: Any) -> Call:
    """A call over the clips of the footage fixture."""
    made = make_call("latents", recipe, inputs={"dataset": footage.dataset, "autoencoder": autoencoder})
    return replace(made, workspace=footage.workspace)


@pytest.fixture
def clips(footage: Any) -> ClipDataset:
    """The same clips, to compare with."""
    return ClipDataset(footage.dataset, footage.workspace, Bucketing(16, 12.0, 42))


def test_every_clip_is_planned_once_for_every_shape_of_its_stages(recipe: Recipe, clips: ClipDataset) -> None:
    items = plan_items(recipe, clips)
    assert len({item.key for item in items}) == len(items) == 16
    stages = {(item.clip.split, item.clip.tiers): item.stages for item in items}
    assert stages["train", ("base",)] == ("stage1",)
    assert stages["train", ("base", "high", "finest")] == ("stage1", "stage2", "stage3")
    # A held-out clip is measured at the shapes of every stage, whatever its tier.
    assert stages["holdout", ("base",)] == ("stage1", "stage2", "stage3")


def test_clips_that_fit_nowhere_are_an_error_when_they_are_all(
    make_recipe: Callable[..., Recipe], clips: ClipDataset
) -> None:
    large = make_recipe(stage={"buckets": {"768px": {1: {"keep": 1.0, "batch": 1}}}})
    with pytest.raises(EncodeError, match="none of 8 clips fits"):
        plan_items(large, clips)


def test_latents_are_what_the_autoencoder_says_of_the_frames(call: Call, clips: ClipDataset, autoencoder: Path) -> None:
    encode_latents(call)
    data, network = LatentDataset(call.out), load_autoencoder(autoencoder).eval()
    clip_id = clips.of("train")[0].footage.clip_id
    video = to_video([clips.read(clip_id, Size(48, 80), 5)])
    with torch.no_grad():
        wanted, tail, still = (
            network.encode(v) for v in (video, video[:, :, -1:], to_video([clips.still(clip_id, Size(48, 80))]))
        )
    batch = data.load([f"{clip_id}/48x80/5"])
    torch.testing.assert_close(batch.latents, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.tails, tail, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.load([f"{clip_id}/48x80/1"]).latents, still, rtol=1e-4, atol=1e-5)
    rows = LATENTS.read(call.out)
    assert (len(rows), set(rows["split"]), set(rows["frames"])) == (16, {"train", "holdout"}, {1, 5})
    assert sum(len(keys) for keys in data.groups("train", "stage2").values()) == 6
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert (result["metrics"]["latents"], result["metrics"]["clips_without_bucket"]) == (16, 0)
    encoders = json.loads((call.out / "encoders.json").read_text(encoding="utf-8"))
    assert encoders["autoencoder"]["scale"] == 2.0
    assert len(encoders["autoencoder"]["digest"]) == len(encoders["text"]["digest"]) == 16


def test_captions_are_embedded_beside_the_empty_prompt(call: Call, clips: ClipDataset) -> None:
    encode_latents(call)
    data, ids = LatentDataset(call.out), list(clips.clips)
    text = data.text(ids[:2])
    assert text.context.shape == (2, 12, 384)
    assert text.pooled.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert float(text.pooled[0] @ text.pooled[1]) > float(text.pooled[0] @ data.null.pooled)
    assert len(load_file(call.out / "text.safetensors")) == 2 * (8 + 1)


def test_finished_shards_are_kept_and_others_made_again(
    call: Call, monkeypatch: pytest.MonkeyPatch, make_recipe: Callable[..., Recipe]
) -> None:
    monkeypatch.setattr("ml.encode.SHARD_ITEMS", 6)
    encode_latents(call)
    shards = sorted(call.out.glob("latents-*.safetensors"))
    version = json.loads((call.out / "result.json").read_text(encoding="utf-8"))["data_version"]
    assert len(shards) == 3
    shards[1].unlink()
    shards[2].with_suffix(".partial").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in (shards[0], shards[2], call.out / "text.safetensors")}
    encode_latents(call)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((call.out / "result.json").read_text(encoding="utf-8"))["data_version"] == version


def test_another_autoencoder_makes_its_own_shards(call: Call, recipe: Recipe, tmp_path: Path) -> None:
    encode_latents(call)
    old = load_file(call.out / "latents-00000.safetensors")
    torch.manual_seed(1)
    save_autoencoder(tmp_path / "other", build_autoencoder(recipe.autoencoder), Origin(recipe.id, "vae_stage1"))
    encode_latents(replace(call, inputs={**call.inputs, "autoencoder": (tmp_path / "other",)}))
    new = load_file(call.out / "latents-00000.safetensors")
    assert old.keys() == new.keys()
    assert not torch.equal(*(tensors[sorted(old)[0]] for tensors in (old, new)))


def test_neighbours_of_one_shape_are_encoded_together(
    recipe: Recipe, clips: ClipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.encode.BATCH_PIXELS", 3 * 5 * 48 * 80)
    items = plan_items(recipe, clips)
    groups = list(same_shape(items))
    assert [item for group in groups for item in group] == items
    assert [(group[0].cell.frames, len(group)) for group in groups] == [(1, 8), (5, 3), (5, 3), (5, 2)]
    assert [list(part) for part in parts([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
