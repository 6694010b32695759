"""Training: `python -m ml.train stage` trains a transformer stage, `python -m ml.train autoencoder` the autoencoder.

Under torchrun every rank runs this; the main one writes. The loop is `ml/training/trainer.py`; what a step computes is
`ml/training/step.py` (or `autoencoder_step.py`). Exit codes that mean something are in `infra/compute/task.py`: 75 says
that training was asked to stop and saved its place, so that calling it again goes on.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from infra.workspace import Workspace
from ml.architectures import Latent
from ml.batching.buckets import Bucketing
from ml.batching.datasets import AutoencoderClips, ClipDataset, LatentDataset, batch_sizes
from ml.batching.sampler import BucketSampler
from ml.batching.stream import BatchStream
from ml.engines.make import make_engine
from ml.engines.protocol import Engine
from ml.entry import Call, lpips_weights, parse
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.lpips import load_lpips
from ml.models.networks import Network, load_network, save_network
from ml.models.text import TextEncoder, build_text_encoder
from ml.models.weights import CARD, WEIGHTS, Origin
from ml.plan import PEAK_TFLOPS
from ml.recipe import Recipe
from ml.sampling.preview import Sampled
from ml.sections import AutoencoderStage, Compute, Stage
from ml.training import report
from ml.training.autoencoder_step import Reconstruction
from ml.training.exits import stopping
from ml.training.levers import prepare
from ml.training.lora import add_lora, merged, save_adapter
from ml.training.meter import Meter
from ml.training.networks import measured_latent, new_transformer, open_autoencoder
from ml.training.objective import denoising
from ml.training.online import Source, clip_dataset, latent_source, online_source
from ml.training.optim import adamw, schedule
from ml.training.plans import autoencoder_plan, stage_plan
from ml.training.stopping import Asked, never
from ml.training.trainer import Aids, Trainer
from ml.training.validation import Exam, Validator

# The frozen encoders, opened once, by whoever asks first.
Opened = Callable[[], tuple[VideoAutoencoder, TextEncoder]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one call; the exit code."""
    call = parse(argv, ("stage", "autoencoder"), "Train a stage of the transformer, or of the autoencoder.")
    with stopping(call.out, call.run_id) as end:
        {"stage": train_stage, "autoencoder": train_autoencoder}[call.op](call, end.asked)
    return end.code


def train_stage(call: Call, asked: Asked = never) -> None:
    """Train one transformer stage from the stage before (`--input init=`), or from the recipe's seed.

    It reads latents, or clips that it encodes itself, as `stage.loading.source` says.
    """
    recipe, stage = call.recipe, call.recipe.stage(call.option("stage"))
    call.log.params({**report.params(stage), **report.params(recipe.network, "model.")})
    plan, engine = stage_plan(recipe, stage, call.out), make_engine(stage.engine, stage.compute)
    opened = cache(partial(encoders, call, engine))
    source = source_of(call, stage, plan.seed, opened)
    network = starting_transformer(call, recipe)
    prepare(network, stage.engine)
    if stage.lora is not None:
        add_lora(network, stage.lora, plan.seed)
    objective = source.wrap(denoising(recipe, stage, network, source.null))
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    sizes = batch_sizes(source.groups, stage)
    sampler = BucketSampler(source.groups, sizes, plan.seed, engine.data_rank, engine.data_size)
    beside = aids(call, engine, stage.compute, asked, validator(call, stage, network, opened))
    stream = BatchStream(sampler, source.load, stage.loading, pin=engine.device.type == "cuda")
    with stream, Trainer(engine, objective, stream, plan, beside) as trainer:
        trainer.fit()
        weights = trainer.weights()
        if engine.is_main:
            export(call, stage, weights)
            finish(call, trainer, weights, {"exported": "ema" if trainer.ema else "raw"})
        engine.close()


def export(call: Call, stage: Stage, weights: Mapping[str, Tensor]) -> None:
    """Write what was trained as the whole network of the stage; adapters by themselves too."""
    finished = starting_transformer(call, call.recipe)
    if stage.lora is not None:
        save_adapter(call.out / "adapter", stage.lora, weights)
    trained = weights if stage.lora is None else merged(finished, stage.lora, weights)
    save_network(call.out, finished, Origin(call.recipe.id, stage.name), trained)


def train_autoencoder(call: Call, asked: Asked = never) -> None:
    """Train one autoencoder stage on clip files, then measure how its latents are normalised."""
    recipe, stage = call.recipe, call.recipe.autoencoder_stage(call.option("stage"))
    call.log.params(report.params(stage))
    plan, engine = autoencoder_plan(recipe, stage, call.out), make_engine(stage.engine, stage.compute)
    network = starting_autoencoder(call, recipe, stage)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    clips = autoencoder_clips(call, recipe, stage, plan.seed)
    groups = clips.groups()
    sampler = BucketSampler(groups, dict.fromkeys(groups, stage.batch), plan.seed, engine.data_rank, engine.data_size)
    lpips = load_lpips(lpips_weights(call)).to(engine.device) if stage.loss.perceptual else None
    objective = Reconstruction(stage.loss, lpips, plan.seed)
    stream = BatchStream(sampler, clips.load, stage.loading, pin=engine.device.type == "cuda")
    with stream, Trainer(engine, objective, stream, plan, aids(call, engine, stage.compute, asked)) as trainer:
        trainer.fit()
        weights = trainer.weights()
        if engine.is_main:
            finished = starting_autoencoder(call, recipe, stage)
            finished.load_state_dict(weights, strict=False)
            videos = (clips.load(batch) for batch in sampler.first_epoch())
            finished.latent = latent_of(finished.eval().to(engine.device), recipe, videos)
            save_autoencoder(call.out, finished, recipe.autoencoder.net, Origin(recipe.id, stage.name))
            finish(call, trainer, weights, {"latent": finished.latent.model_dump(mode="json")})
        engine.close()


def latent_of(autoencoder: VideoAutoencoder, recipe: Recipe, videos: Iterable[Tensor]) -> Latent:
    """How latents are normalised: as the recipe says, or as measured."""
    return recipe.autoencoder.latent or measured_latent(autoencoder, recipe.autoencoder.kind, videos)


def source_of(call: Call, stage: Stage, seed: int, opened: Opened) -> Source:
    """Where the batches of a transformer stage come from."""
    recipe = call.recipe
    if stage.loading.source == "latents":
        return latent_source(LatentDataset(call.input("latents")), stage)
    autoencoder, text = opened()
    clips = clip_dataset(recipe, stage, call.input("dataset"), call.workspace)
    return online_source(recipe, stage, clips, seed, autoencoder, text)


def encoders(call: Call, engine: Engine) -> tuple[VideoAutoencoder, TextEncoder]:
    """The frozen autoencoder and text encoder of the recipe, on the device; their weights cut over tensor ranks."""
    autoencoder, cache = open_autoencoder(call.recipe, call.input("autoencoder")), Workspace(call.workspace).cache
    engine.cut(autoencoder)
    text = build_text_encoder(call.recipe.text, cache / "text", str(engine.device), engine.cut)
    return autoencoder.to(engine.device), text


def validator(call: Call, stage: Stage, network: Network, opened: Opened) -> Validator | None:
    """The look at training that a stage asks for; held-out latents and, for samples, the autoencoder are inputs."""
    section = stage.validation
    if section is None:
        return None
    preview = None
    if section.prompts:
        autoencoder, text = opened()
        preview = Sampled(call.recipe, stage, autoencoder, text)
    exam = Exam.of(call.recipe, stage, LatentDataset(call.input("latents")), preview)
    return Validator(network, section.every, exam, call.out, call.log)


def starting_transformer(call: Call, recipe: Recipe) -> Network:
    """The network that a stage starts from: that of the stage before, or a fresh one."""
    network = new_transformer(recipe)
    if "init" in call.inputs:
        load_network(call.input("init"), network, recipe.id)
    return network


def starting_autoencoder(call: Call, recipe: Recipe, stage: AutoencoderStage) -> VideoAutoencoder:
    """The network that a stage starts from: that of the stage before, or a fresh one; the trained part unfrozen."""
    torch.manual_seed(recipe.seed)
    if "init" in call.inputs:
        network = load_autoencoder(call.input("init"), recipe.autoencoder, recipe.id)
        network.latent = Latent()
    else:
        network = build_autoencoder(recipe.autoencoder.net)
        network.initialise()
    network.train_only(stage.part)
    return network


def autoencoder_clips(call: Call, recipe: Recipe, stage: AutoencoderStage, seed: int) -> AutoencoderClips:
    """The clips that a stage trains on, of the lengths that the autoencoder encodes."""
    bucketing = Bucketing(recipe.strides.pixels, recipe.dataset.fps_max, recipe.seed)
    lengths = [frames for frames in range(2, stage.frames + 1) if recipe.strides.encodes(frames)]
    return AutoencoderClips(ClipDataset(call.input("dataset"), call.workspace, bucketing), stage, seed, lengths)


def aids(call: Call, engine: Engine, compute: Compute, asked: Asked, look: Validator | None = None) -> Aids:
    """What stands beside the loop: log, meter, a look at the weights, and who asks it to stop."""
    accelerator = compute.accelerators.split(":")[0]
    per_rank = PEAK_TFLOPS[accelerator] * 1e12 * compute.devices / engine.size
    return Aids(call.log, Meter(per_rank, engine.size), look, call.run_id, asked)


def finish(call: Call, trainer: Trainer, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Draw the loss and write the result; the weights and their card are the step's data."""
    picture = report.draw(trainer)
    numbers = {**report.numbers(trainer), "num_parameters": float(sum(w.numel() for w in weights.values()))}
    call.finish(numbers, {**report.facts(trainer), **facts}, [picture], [CARD, WEIGHTS])


if __name__ == "__main__":
    sys.exit(main())
