"""Training from clip files: the same latents that encoding before would have written, made while training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.tracking import RunLog
from ml.architectures import Latent
from ml.batching.datasets import ClipBatch, ClipBatches, ClipDataset, DatasetError, LatentDataset, batch_sizes
from ml.batching.encoding import captions_of
from ml.batching.sampler import Batch, BucketSampler, Position
from ml.batching.stream import BatchStream
from ml.encode import encode_latents, plan_items
from ml.engines.make import make_engine
from ml.entry import Call
from ml.methods import Engine, Loading
from ml.models.autoencoders.registry import build_autoencoder, save_autoencoder
from ml.models.text import T5, T5_FOLDER, MiniLM, build_text_encoder
from ml.models.weights import Origin
from ml.recipe import Recipe
from ml.train import encoders
from ml.training.networks import new_transformer, open_autoencoder
from ml.training.objective import denoising
from ml.training.online import Online, Source, Words, clip_dataset, latent_source, online_source
from ml.training.optim import adamw, schedule, step_generator
from ml.training.step import take_step

TEXT = {"kind": "minilm", "max_tokens": 12, "context_dim": 384, "pooled_dim": 384}
CPU = torch.device("cpu")


def saved(recipe: Recipe, folder: Path) -> Path:
    """The folder of an untrained autoencoder."""
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder.net)
    network.initialise()
    network.latent = Latent(scale=2.0)
    save_autoencoder(folder, network, recipe.autoencoder.net, Origin(recipe.id, "vae_stage1"))
    return folder


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(text=TEXT, stage={"loading": {"source": "clips"}})


@pytest.fixture(scope="module")
def autoencoder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(recipe, tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def text(recipe: Recipe) -> Any:
    return build_text_encoder(recipe.text)


@pytest.fixture
def source(recipe: Recipe, footage: Any, autoencoder: Path, text: Any) -> Source:
    stage = recipe.stage("stage1")
    clips = clip_dataset(recipe, stage, footage.dataset, footage.workspace)
    return online_source(recipe, stage, clips, 5, open_autoencoder(recipe, autoencoder), text)


def online(source: Source) -> Online:
    made = source.wrap(None)  # type: ignore[arg-type]  # nothing is asked of the objective here
    assert isinstance(made, Online)
    return made


def test_what_is_encoded_while_training_is_what_encoding_before_writes(
    recipe: Recipe, source: Source, make_call: Any, footage: Any, autoencoder: Path
) -> None:
    call = make_call("latents", recipe, inputs={"dataset": footage.dataset, "autoencoder": autoencoder})
    call = replace(call, workspace=footage.workspace)
    encode_latents(call)
    before, clips = LatentDataset(call.out), clip_dataset(recipe, recipe.stage("stage1"), *folders(footage))
    wanted = latent_source(before, recipe.stage("stage1"))
    cell = next(cell for cell in source.groups if cell.frames == 5)
    assert {cell: len(ids) for cell, ids in source.groups.items()} == {
        cell: len(keys) for cell, keys in wanted.groups.items()
    }
    keys = wanted.groups[cell][:3]
    ids = tuple(key.split("/")[0] for key in keys)
    frames = torch.stack([torch.from_numpy(clips.read(clip_id, cell.size, 5)) for clip_id in ids])
    batch = Batch(cell, ids, Position())
    found, there = online(source).encoded(ClipBatch(frames, ids, torch.full((3,), 12.0), batch), CPU), before.load(keys)
    for name in ("latents", "heads", "tails"):
        torch.testing.assert_close(getattr(found, name), getattr(there, name), rtol=1e-4, atol=1e-5)
    assert found.damaged is None
    assert torch.equal(found.text.mask, there.text.mask)
    torch.testing.assert_close(found.text.context, there.text.context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(source.null.context, before.null.context, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.fps, there.fps)


def folders(footage: Any) -> tuple[Path, Path]:
    return footage.dataset, footage.workspace


def test_spans_are_drawn_anew_every_epoch_and_again_for_the_same_batch(recipe: Recipe, footage: Any) -> None:
    stage = recipe.stage("stage1")
    batches = ClipBatches(clip_dataset(recipe, stage, *folders(footage)), stage, 5)
    cell, ids = next((cell, ids) for cell, ids in batches.groups().items() if cell.frames == 5)
    read = [batches.load(Batch(cell, tuple(ids), Position(epoch, 0))).frames for epoch in (*range(6), 0)]
    assert read[0].shape == (6, 5, 48, 80, 3)
    assert torch.equal(read[0], read[-1])
    assert len({frames[0].numpy().tobytes() for frames in read}) > 1
    large = stage.model_copy(update={"buckets": {"768px": stage.buckets["48x80"]}})
    with pytest.raises(DatasetError, match="no train clip fits a bucket of stage1"):
        ClipBatches(batches.clips, large, 5).groups()


def test_damage_is_drawn_for_every_batch(
    make_generation: Callable[..., Recipe], footage: Any, text: Any, tmp_path: Path
) -> None:
    """1.3: another epoch damages the same frames differently; the same batch is damaged alike."""
    always = {"pixel_noise_chance": 1.0, "pixel_noise": 0.4, "spatial_chance": 1.0, "temporal_chance": 0.0}
    small = make_generation("v1_3", text=TEXT, objective={"augmentation": always})
    clips = clip_dataset(small, small.stages[0], *folders(footage))
    vae = open_autoencoder(small, saved(small, tmp_path))
    made = online_source(small, small.stages[0], clips, 5, vae, text)
    cell, ids = next((cell, ids) for cell, ids in made.groups.items() if cell.frames == 5)
    frames = torch.stack([torch.from_numpy(clips.read(clip_id, cell.size, 5)) for clip_id in ids[:2]])
    found = []
    for epoch in (0, 1, 0):
        batch = Batch(cell, tuple(ids[:2]), Position(epoch, 3))
        found.append(online(made).encoded(ClipBatch(frames, batch.ids, torch.full((2,), 12.0), batch), CPU))
    damaged = [batch.damaged for batch in found]
    assert all(torch.equal(batch.latents, found[0].latents) for batch in found)
    assert all(isinstance(one, Tensor) for one in damaged)
    assert torch.equal(damaged[0], damaged[2])
    assert not torch.equal(damaged[0], damaged[1])


def trained(recipe: Recipe, source: Source, workers: int) -> dict[str, Tensor]:
    stage = recipe.stage("stage1")
    engine, network = make_engine(stage.engine, stage.compute), new_transformer(recipe)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    order = BucketSampler(source.groups, batch_sizes(source.groups, stage), 3)
    objective = source.wrap(denoising(recipe, stage, network, source.null))
    with BatchStream(order, source.load, Loading(source="clips", workers=workers)) as stream:
        for step in range(4):
            _, clips = stream.next()
            objective.begin(step)
            report = take_step(engine, objective, [clips], [step_generator(CPU, 7, 0, step)])
            assert report.updated
    return {name: tensor.detach().clone() for name, tensor in engine.masters().items()}


def test_a_stage_trains_from_clips_that_workers_decode_as_from_those_of_a_thread(
    recipe: Recipe, source: Source
) -> None:
    before = new_transformer(recipe).state_dict()
    thread, workers = trained(recipe, source, 0), trained(recipe, source, 2)
    assert all(torch.equal(thread[name], workers[name]) for name in thread)
    assert any(not torch.equal(thread[name], before[name]) for name in thread)


class Counted:
    """A text encoder that says how many prompts it was given."""

    def __init__(self, encoder: MiniLM) -> None:
        self.encoder, self.seen = encoder, []

    @property
    def digest(self) -> str:
        return self.encoder.digest

    def encode(self, prompts: Any) -> Any:
        self.seen += prompts
        return self.encoder.encode(prompts)


def test_a_caption_is_embedded_once_and_the_oldest_are_forgotten(recipe: Recipe, footage: Any, text: Any) -> None:
    clips = ClipDataset(footage.dataset, footage.workspace, clip_dataset_rule(recipe, footage))
    captions = captions_of(recipe, clips.clips, clips.bucketing)
    assert {item.clip.footage.clip_id for item in plan_items(recipe, clips)} == set(captions)
    ids, counted = list(captions), Counted(text)
    words = Words(counted, captions)
    found = words.of([ids[0], ids[1], ids[0]])
    torch.testing.assert_close(found.pooled[1], text.encode([captions[ids[1]]]).pooled[0])
    assert torch.equal(found.context[0], found.context[2])
    words.of([ids[1], ids[2]])
    assert sorted(counted.seen) == sorted(captions[i] for i in ids[:3])
    one = words.of(ids[:1])
    small = Words(counted, captions, most=2 * sum(getattr(one, n).nbytes for n in ("context", "pooled", "mask")))
    counted.seen.clear()
    for clip_id in (ids[0], ids[1], ids[0], ids[2], ids[0], ids[1]):
        small.of([clip_id])
    assert counted.seen == [captions[i] for i in (ids[0], ids[1], ids[2], ids[1])]


def clip_dataset_rule(recipe: Recipe, footage: Any) -> Any:
    return clip_dataset(recipe, recipe.stage("stage1"), *folders(footage)).bucketing


def encoded(recipe: Recipe, processes: int, workspace: Path, autoencoder: Path) -> tuple[Any, ...]:
    """What the frozen encoders say on this rank, and how many numbers it holds of them."""
    document = recipe.stage("stage1").engine.model_dump()
    section = Engine.model_validate({**document, "tensor_parallel": processes})
    engine = make_engine(section, recipe.stage("stage1").compute.model_copy(update={"processes": processes}))
    inputs = {"autoencoder": (autoencoder,)}
    vae, text = encoders(Call("stage", recipe, workspace, workspace, inputs, {}, RunLog()), engine)
    assert isinstance(text, T5)
    said = text.encode(["a red boat", ""])
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        latents = vae.encode(video)
        seen = vae.decode(latents)
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in (vae, text._t5)]
    engine.close()
    return (said.context, said.mask, latents, seen), sizes


def test_frozen_encoders_are_cut_over_tensor_ranks_and_say_the_same(
    make_recipe: Callable[..., Recipe], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    tiny_t5(tmp_path / "cache" / "text")
    recipe = make_recipe(text={"kind": "t5", "max_tokens": 6, "context_dim": 32, "pooled_dim": 0})
    vae = saved(recipe, tmp_path / "vae")
    wanted, whole = encoded(recipe, 1, tmp_path, vae)
    for found, sizes in ranks(encoded, recipe, 2, tmp_path, vae):
        assert all(part < 0.75 * all_ for part, all_ in zip(sizes, whole, strict=True))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def tiny_t5(folder: Path) -> None:
    """A T5 of random weights where the published one is looked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "boat"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder / T5_FOLDER
    )
    config = T5Config(
        vocab_size=6, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder / T5_FOLDER)
