"""From a recipe's stage to the plan of its training: seeds, cadence, and whose checkpoints may be resumed."""

from pathlib import Path
from typing import Any

from ml.manifest import stable_id
from ml.methods import Engine
from ml.recipe import Recipe
from ml.sections import AutoencoderStage, Stage
from ml.training.checkpoint import Identity
from ml.training.trainer import Plan

# What a stage costs, how often it saves and looks, and how its work is spread over ranks does not change what it
# learns: a checkpoint survives such edits.
LEARNS = {"precision", "grad_clip", "accumulate", "fp8"}
NOT_TRAINING: dict[str, Any] = {
    **dict.fromkeys(
        ("compute", "published", "utilisation", "checkpoint_every", "keep_checkpoints", "validation", "survival"), True
    ),
    "loading": {"workers", "ahead", "timeout_seconds"},
    "engine": set(Engine.model_fields) - LEARNS,
}


def stage_plan(recipe: Recipe, stage: Stage, out: Path) -> Plan:
    """How a transformer stage is trained into a folder."""
    sections = recipe.digest("seed", "model", "text", "objective")
    return Plan(
        out=out,
        identity=_identity(recipe, stage, sections),
        seed=_seed(recipe, stage),
        steps=stage.steps,
        checkpoint_every=stage.checkpoint_every,
        keep_checkpoints=stage.keep_checkpoints,
        ema_decay=stage.ema_decay,
        engine=stage.engine,
        guard=stage.guard,
        hang_seconds=stage.survival.hang_seconds,
    )


def autoencoder_plan(recipe: Recipe, stage: AutoencoderStage, out: Path) -> Plan:
    """How an autoencoder stage is trained into a folder."""
    network = recipe.autoencoder.net.model_dump_json()
    return Plan(
        out=out,
        identity=_identity(recipe, stage, recipe.digest("seed"), network),
        seed=_seed(recipe, stage),
        steps=stage.steps,
        checkpoint_every=stage.checkpoint_every,
        keep_checkpoints=stage.keep_checkpoints,
        ema_decay=stage.ema_decay,
        engine=stage.engine,
        guard=stage.guard,
        hang_seconds=stage.survival.hang_seconds,
    )


def _identity(recipe: Recipe, stage: Stage | AutoencoderStage, *decides: str) -> Identity:
    return Identity(recipe.id, stage.name, stable_id(*decides, stage.model_dump_json(exclude=NOT_TRAINING)))


def _seed(recipe: Recipe, stage: Stage | AutoencoderStage) -> int:
    """A seed of its own for every stage, so that stages do not see their examples in the same order."""
    return int(stable_id(recipe.seed, stage.name)[:8], 16)
