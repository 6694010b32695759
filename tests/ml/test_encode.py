"""Encoding, with a real (untrained) autoencoder and the real MiniLM."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ml.architectures import Latent
from ml.batching.buckets import Bucketing
from ml.batching.datasets import ClipDataset, LatentDataset, to_video
from ml.batching.encoding import captions_of
from ml.encode import EncodeError, clips_of, encode_latents, parts, plan_items, same_shape
from ml.entry import Call
from ml.manifest import LATENTS
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.networks import save_network
from ml.models.weights import Origin
from ml.recipe import Recipe
from ml.sample import measure_losses
from ml.score_text import with_scores
from ml.shapes import Size
from ml.training.networks import new_transformer

MINILM = {"kind": "minilm", "max_tokens": 12, "context_dim": 384, "pooled_dim": 384}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    """The small recipe with the text encoder it names."""
    return make_recipe(text=MINILM)


@pytest.fixture(scope="module")
def autoencoder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained autoencoder with a scale of 2."""
    return saved(recipe, tmp_path_factory.mktemp("autoencoder"), Latent(scale=2.0))


def saved(recipe: Recipe, folder: Path, latent: Latent, seed: int = 0) -> Path:
    """A folder with the recipe's untrained autoencoder."""
    torch.manual_seed(seed)
    network = build_autoencoder(recipe.autoencoder.net, latent)
    save_autoencoder(folder, network, recipe.autoencoder.net, Origin(recipe.id, "vae_stage1"))
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


def test_without_stages_held_out_clips_are_encoded_as_samples_are_made(
    make_recipe: Callable[..., Recipe], make_call: Callable[..., Call], footage: Any, tmp_path: Path
) -> None:
    """Enough for the held-out loss of released weights that nothing trains on."""
    released = make_recipe(text=MINILM, stages=[], pretrained={"uri": "weights/dit.safetensors"})
    inputs = {"dataset": footage.dataset, "autoencoder": saved(released, tmp_path / "vae", Latent(scale=2.0))}
    call = replace(make_call("latents", released, inputs=inputs), workspace=footage.workspace)
    encode_latents(call)
    latents = LatentDataset(call.out)
    assert set(latents.rows["split"]) == {"holdout"}
    ((cell, keys),) = latents.groups("holdout").items()
    assert (cell.resolution, cell.frames, len(keys)) == ("48x80", 5, 2)
    losses = make_call("losses", released, "losses", {"latents": call.out}, stages="pretrained")
    network = new_transformer(released)
    save_network(tmp_path / "pretrained", network, Origin(released.id, "released"))
    measure_losses(replace(losses, inputs={**losses.inputs, "checkpoint": (tmp_path / "pretrained",)}))
    assert json.loads((losses.out / "losses.json").read_text(encoding="utf-8"))["num_clips"] == 2


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
        wanted, head, tail, still = (
            network.encode(v)
            for v in (video, video[:, :, :1], video[:, :, -1:], to_video([clips.still(clip_id, Size(48, 80))]))
        )
    batch = data.load([f"{clip_id}/48x80/48x80/5"])
    torch.testing.assert_close(batch.latents, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.heads, head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.tails, tail, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.load([f"{clip_id}/48x80/48x80/1"]).latents, still, rtol=1e-4, atol=1e-5)
    rows = LATENTS.read(call.out)
    assert (len(rows), set(rows["split"]), set(rows["frames"])) == (16, {"train", "holdout"}, {1, 5})
    assert sum(len(keys) for keys in data.groups("train", "stage2").values()) == 6
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert (result["metrics"]["latents"], result["metrics"]["clips_without_bucket"]) == (16, 0)
    encoders = json.loads((call.out / "encoders.json").read_text(encoding="utf-8"))
    assert encoders["autoencoder"]["latent"] == {"scale": 2.0, "mean": [], "std": []}
    assert encoders["autoencoder"]["kind"] == "hunyuan"
    assert len(encoders["autoencoder"]["digest"]) == len(encoders["text"]["digest"]) == 16


def test_captions_are_embedded_beside_the_empty_prompt(call: Call, clips: ClipDataset) -> None:
    encode_latents(call)
    data, ids = LatentDataset(call.out), list(clips.clips)
    text = data.text(ids[:2])
    assert text.context.shape == (2, 12, 384)
    assert text.pooled.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert float(text.pooled[0] @ text.pooled[1]) > float(text.pooled[0] @ data.null.pooled[0])
    # Context, pooled vector and mask of eight captions and of the empty prompt, which has two tokens of its own.
    assert len(load_file(call.out / "text.safetensors")) == 3 * (8 + 1)
    assert data.null.mask.sum(1).tolist() == [2]
    assert (text.mask.sum(1) > 2).all()
    assert torch.equal(text.mask, text.context.abs().sum(-1) > 0)


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
    other = saved(recipe, tmp_path / "other", Latent(), seed=1)
    encode_latents(replace(call, inputs={**call.inputs, "autoencoder": (other,)}))
    new = load_file(call.out / "latents-00000.safetensors")
    assert old.keys() == new.keys()
    assert not torch.equal(*(tensors[sorted(old)[0]] for tensors in (old, new)))


def test_neighbours_of_one_shape_are_encoded_together(
    recipe: Recipe, clips: ClipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml.batching.encoding.BATCH_PIXELS", 3 * 5 * 48 * 80)
    items = plan_items(recipe, clips)
    groups = list(same_shape(items))
    assert [item for group in groups for item in group] == items
    assert [(group[0].cell.frames, len(group)) for group in groups] == [(1, 8), (5, 3), (5, 3), (5, 2)]
    assert [list(part) for part in parts([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]


def test_one_size_under_two_names_is_encoded_twice(make_recipe: Callable[..., Recipe], clips: ClipDataset) -> None:
    """`48x80` and `64px` may be the same pixels; a stage that asks for the one must not find the other's."""
    two = make_recipe(stage={"buckets": {name: {5: {"keep": 0.5, "batch": 1}} for name in ("48x80", "64px")}})
    keys = [item.key for item in plan_items(two, clips)]
    assert len(keys) == len(set(keys))
    assert {key.split("/", 1)[1] for key in keys} == {"48x80/48x80/5", "64px/48x80/5"}


@pytest.mark.parametrize(("name", "ends"), [("v1_1", False), ("v1_2", False), ("v1_3", True)])
def test_every_generation_encodes_what_its_network_is_told(
    make_generation: Callable[..., Recipe],
    make_call: Callable[..., Call],
    footage: Any,
    tmp_path: Path,
    name: str,
    ends: bool,
) -> None:
    """Lengths by the autoencoder's law, ends where pictures are given apart, latents normalised channel by channel."""
    small = make_generation(name)
    channels = small.autoencoder.latent_channels
    latent = Latent(mean=tuple(0.1 * i for i in range(channels)), std=(0.5,) * channels)
    inputs = {"dataset": footage.dataset, "autoencoder": saved(small, tmp_path / "vae", latent)}
    call = replace(make_call("latents", small, inputs=inputs), workspace=footage.workspace)
    encode_latents(call)
    data, rows = LatentDataset(call.out), LATENTS.read(call.out)
    frames = small.sampling.frames
    assert set(rows["frames"]) == {1, frames}
    assert set(rows["fps"]) == {12.0}
    key = next(key for key, length in zip(rows["key"], rows["frames"], strict=True) if length == frames)
    batch = data.load([key])
    assert batch.latents.shape == (1, channels, small.strides.latent_frames(frames), 6, 10)
    assert (batch.heads is not None, batch.tails is not None) == (ends, ends)
    network = load_autoencoder(tmp_path / "vae").eval()
    source = ClipDataset(footage.dataset, footage.workspace, Bucketing(8, 12.0, small.seed))
    video = to_video([source.read(key.split("/")[0], Size(48, 80), frames)])
    with torch.no_grad():
        raw = network.posterior(video)[0]
        wanted = torch.stack([(raw[:, c] - 0.1 * c) / 0.5 for c in range(channels)], 1)
    torch.testing.assert_close(batch.latents, wanted, rtol=1e-4, atol=1e-4)


def test_a_damaged_copy_stands_beside_each_clip_where_the_recipe_augments(
    make_generation: Callable[..., Recipe], make_call: Callable[..., Call], footage: Any, tmp_path: Path
) -> None:
    """1.3: what of a clip is damaged is drawn from seed and clip, so that encoding again gives the same."""
    always = {"pixel_noise_chance": 1.0, "pixel_noise": 0.4, "spatial_chance": 1.0, "temporal_chance": 0.0}
    small = make_generation("v1_3", objective={"augmentation": always})
    inputs = {"dataset": footage.dataset, "autoencoder": saved(small, tmp_path / "vae", Latent())}
    found = []
    for out in ("one", "two"):
        call = replace(make_call("latents", small, out=out, inputs=inputs), workspace=footage.workspace)
        encode_latents(call)
        rows = LATENTS.read(call.out)
        found.append(LatentDataset(call.out).load([rows["key"][rows["frames"] == 5].iloc[0]]))
    assert found[0].damaged is not None
    assert found[0].damaged.shape == found[0].latents.shape
    assert not torch.allclose(found[0].damaged, found[0].latents, atol=1e-3)
    assert torch.equal(found[0].damaged, found[1].damaged)
    assert torch.equal(found[0].latents, found[1].latents)
    plain = replace(
        make_call("latents", make_generation("v1_3"), out="two", inputs=inputs), workspace=footage.workspace
    )
    encode_latents(plain)
    assert LatentDataset(plain.out).load([LATENTS.read(plain.out)["key"][0]]).damaged is None, "its shards are its own"


def test_captions_of_2_0_end_with_their_clips_frame_rate(
    make_recipe: Callable[..., Recipe], recipe: Recipe, clips: ClipDataset
) -> None:
    """As `ml/score_text.py` writes it in prompts, without a motion score; other generations add nothing."""
    plain = make_recipe(sampling={"score": {"style": "none", "motion": None}})
    found = clips_of(plan_items(recipe, clips))
    bare = captions_of(plain, found, clips.bucketing)
    assert bare == {clip_id: clip.caption for clip_id, clip in clips.clips.items()}
    assert captions_of(recipe, found, clips.bucketing) == {name: f"{text}. 12 FPS." for name, text in bare.items()}
    slow = captions_of(recipe, found, replace(clips.bucketing, fps_max=5))
    assert set(slow.values()) == {f"{text}. 4 FPS." for text in bare.values()}
    asked = with_scores("a wave", recipe.sampling.score, recipe.sampling.fps)
    assert asked == "a wave. 12 FPS.", "the smallest profile asks for nothing that its captions never said"


def test_a_clip_faster_than_the_recipe_is_written_at_the_rate_that_is_left(
    make_recipe: Callable[..., Recipe], call: Call
) -> None:
    """Footage of 12 frames per second for a recipe of 5: every third frame, at 4 a second."""
    slow = make_recipe(
        text=MINILM, dataset={"fps_max": 5}, stage={"buckets": {"48x80": {1: {"keep": 1.0, "batch": 2}}}}
    )
    assert slow.sampling.fps == 12, "the rate of samples is another thing"
    encode_latents(replace(call, given_recipe=slow))
    assert set(LATENTS.read(call.out)["fps"]) == {4.0}
    batch = LatentDataset(call.out).load([LATENTS.read(call.out)["key"][0]])
    assert batch.fps.tolist() == [4.0]
