"""Training: `python -m ml.train stage` trains a transformer stage, `python -m ml.train autoencoder` the autoencoder.

The loop is `ml/training/trainer.py`; what a step computes is `ml/training/step.py` (or `autoencoder_step.py`). Exit
code 75 means that training was asked to stop and saved its place: call it again to go on.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ml.architectures import Latent
from ml.batching.buckets import Bucketing
from ml.batching.datasets import AutoencoderClips, ClipDataset, LatentDataset, batch_sizes
from ml.batching.sampler import BatchStream, BucketSampler
from ml.engines.plain import make_engine
from ml.entry import Call, lpips_weights, parse
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.registry import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.lpips import load_lpips
from ml.models.networks import load_network, save_network
from ml.models.weights import CARD, WEIGHTS, Origin
from ml.recipe import Recipe
from ml.sections import AutoencoderStage
from ml.training import report
from ml.training.autoencoder_step import Reconstruction
from ml.training.networks import measured_latent, new_transformer
from ml.training.objective import denoising
from ml.training.optim import adamw, schedule
from ml.training.plans import AUTOENCODER_ENGINE, autoencoder_plan, stage_plan
from ml.training.trainer import Preempted, Trainer

PREEMPTED = 75


def main(argv: Sequence[str] | None = None) -> int:
    """Run one call; returns 0, or 75 when preempted."""
    call = parse(argv, ("stage", "autoencoder"), "Train a stage of the transformer, or of the autoencoder.")
    try:
        {"stage": train_stage, "autoencoder": train_autoencoder}[call.op](call)
    except Preempted as stopped:
        print(f"preempted: {stopped}", file=sys.stderr)
        return PREEMPTED
    return 0


def train_stage(call: Call) -> None:
    """Train one transformer stage on latents, from the stage before (`--input init=`) or from the recipe's seed."""
    recipe, stage = call.recipe, call.recipe.stage(call.option("stage"))
    call.log.params({**report.params(stage), **report.params(recipe.network, "model.")})
    plan, engine = stage_plan(recipe, stage, call.out), make_engine(stage.engine, stage.compute)
    latents = LatentDataset(call.input("latents"))
    network = new_transformer(recipe)
    network.checkpoint_blocks = stage.engine.checkpoint_blocks
    if "init" in call.inputs:
        load_network(call.input("init"), network, recipe.id)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    groups = latents.groups("train", stage.name)
    sampler = BucketSampler(groups, batch_sizes(groups, stage), plan.seed, engine.data_rank, engine.data_size)
    objective = denoising(recipe, stage, network, latents.null)
    with BatchStream(sampler, lambda batch: latents.load(batch.ids)) as stream:
        trainer = Trainer(engine, objective, stream, plan, call.log)
        trainer.fit()
    save_network(call.out, network, Origin(recipe.id, stage.name), trainer.weights())
    finish(call, trainer, {"exported": "ema" if trainer.ema else "raw"})


def train_autoencoder(call: Call) -> None:
    """Train one autoencoder stage on clip files, then measure how its latents are normalised."""
    recipe, stage = call.recipe, call.recipe.autoencoder_stage(call.option("stage"))
    call.log.params(report.params(stage))
    plan, engine = autoencoder_plan(recipe, stage, call.out), make_engine(AUTOENCODER_ENGINE, stage.compute)
    network = new_autoencoder(call, recipe, stage)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, stage.steps))
    clips = autoencoder_clips(call, recipe, stage, plan.seed)
    groups = clips.groups()
    sizes = dict.fromkeys(groups, stage.batch)
    sampler = BucketSampler(groups, sizes, plan.seed, engine.data_rank, engine.data_size)
    lpips = load_lpips(lpips_weights(call)).to(engine.device) if stage.loss.perceptual else None
    objective = Reconstruction(stage.loss, lpips, plan.seed)
    with BatchStream(sampler, clips.load) as stream:
        trainer = Trainer(engine, objective, stream, plan, call.log)
        trainer.fit()
    trained = {name.removeprefix("net."): tensor for name, tensor in trainer.weights().items()}
    network.net.load_state_dict(trained, strict=False)
    videos = (clips.load(batch) for batch in sampler.first_epoch())
    network.latent = recipe.autoencoder.latent or measured_latent(network.eval(), recipe.autoencoder.kind, videos)
    save_autoencoder(call.out, network, recipe.autoencoder.net, Origin(recipe.id, stage.name))
    finish(call, trainer, {"latent": network.latent.model_dump(mode="json")})


def new_autoencoder(call: Call, recipe: Recipe, stage: AutoencoderStage) -> VideoAutoencoder:
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


def finish(call: Call, trainer: Trainer, facts: Mapping[str, Any]) -> None:
    """Draw the loss and write the result; the weights and their card are the step's data."""
    picture = report.draw(trainer)
    call.finish(report.numbers(trainer), {**report.facts(trainer), **facts}, [picture], [CARD, WEIGHTS])


if __name__ == "__main__":
    sys.exit(main())
