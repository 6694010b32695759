"""Training: `python -m ml.train stage` trains a transformer stage, `python -m ml.train autoencoder` the autoencoder.

The loop is `ml/training/trainer.py`; what a step computes is `ml/training/step.py` (or `autoencoder_step.py`). Exit
code 75 means that training was asked to stop and saved its place: call it again to go on.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ml.batching.buckets import Bucketing
from ml.batching.datasets import AutoencoderClips, ClipDataset, LatentDataset, batch_sizes
from ml.batching.sampler import BatchStream, BucketSampler
from ml.engines.plain import make_engine
from ml.entry import Call, lpips_weights, parse
from ml.models.autoencoders.hunyuan import build_autoencoder, load_autoencoder, save_autoencoder
from ml.models.lpips import load_lpips
from ml.models.mmdit import load_mmdit, save_mmdit
from ml.models.weights import CARD, WEIGHTS, Origin
from ml.training import report
from ml.training.autoencoder_step import Reconstruction
from ml.training.networks import measured_scale, new_transformer
from ml.training.optim import adamw, warm_up
from ml.training.plans import AUTOENCODER_ENGINE, autoencoder_plan, stage_plan
from ml.training.step import FlowMatching
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
    call.log.params({**report.params(stage), **report.params(recipe.model, "model.")})
    plan, engine = stage_plan(recipe, stage, call.out), make_engine(stage.engine, stage.compute)
    latents = LatentDataset(call.input("latents"))
    network = new_transformer(recipe)
    network.checkpoint_blocks = stage.engine.checkpoint_blocks
    if "init" in call.inputs:
        load_mmdit(call.input("init"), network, recipe.id)
    engine.setup(network, adamw(stage.optimizer), warm_up(stage.optimizer))
    groups = latents.groups("train", stage.name)
    sampler = BucketSampler(groups, batch_sizes(groups, stage), plan.seed, engine.data_rank, engine.data_size)
    objective = FlowMatching(recipe.objective, stage.conditions, recipe.model.patch, latents.null)
    with BatchStream(sampler, lambda batch: latents.load(batch.ids)) as stream:
        trainer = Trainer(engine, objective, stream, plan, call.log)
        trainer.fit()
    save_mmdit(call.out, network, Origin(recipe.id, stage.name), trainer.weights())
    finish(call, trainer, {"exported": "ema" if trainer.ema else "raw"})


def train_autoencoder(call: Call) -> None:
    """Train one autoencoder stage on clip files, then measure the scale of its latents."""
    recipe, stage = call.recipe, call.recipe.autoencoder_stage(call.option("stage"))
    call.log.params(report.params(stage))
    plan, engine = autoencoder_plan(recipe, stage, call.out), make_engine(AUTOENCODER_ENGINE, stage.compute)
    torch.manual_seed(recipe.seed)
    network = build_autoencoder(recipe.autoencoder)
    if "init" in call.inputs:
        network = load_autoencoder(call.input("init"), recipe.autoencoder, recipe.id)
    engine.setup(network, adamw(stage.optimizer), warm_up(stage.optimizer))
    bucketing = Bucketing(recipe.strides.pixels, recipe.sampling.fps, recipe.seed)
    clips = AutoencoderClips(ClipDataset(call.input("dataset"), call.workspace, bucketing), stage, plan.seed)
    groups = clips.groups()
    sizes = dict.fromkeys(groups, stage.batch)
    sampler = BucketSampler(groups, sizes, plan.seed, engine.data_rank, engine.data_size)
    lpips = load_lpips(lpips_weights(call)).to(engine.device) if stage.loss.perceptual else None
    objective = Reconstruction(stage.loss, lpips)
    with BatchStream(sampler, clips.load) as stream:
        trainer = Trainer(engine, objective, stream, plan, call.log)
        trainer.fit()
    videos = (clips.load(batch) for batch in sampler.first_epoch())
    network.scale = recipe.autoencoder.scale or measured_scale(network.eval(), videos)
    save_autoencoder(call.out, network, Origin(recipe.id, stage.name))
    finish(call, trainer, {"scale": network.scale})


def finish(call: Call, trainer: Trainer, facts: Mapping[str, Any]) -> None:
    """Draw the loss and write the result; the weights and their card are the step's data."""
    picture = report.draw(trainer)
    call.finish(report.numbers(trainer), {**report.facts(trainer), **facts}, [picture], [CARD, WEIGHTS])


if __name__ == "__main__":
    sys.exit(main())
