"""From a recipe's stage to the plan of its training: seeds, cadence, and whose checkpoints may be resumed."""

import json
from pathlib import Path

from ml.manifest import stable_id
from ml.recipe import Recipe
from ml.sections import AutoencoderStage, Phase, Stage
from ml.training.checkpoint import Identity
from ml.training.trainer import Plan


def stage_plan(recipe: Recipe, stage: Stage, out: Path) -> Plan:
    """How a transformer stage is trained into a folder."""
    return _plan(recipe, stage, out, recipe.digest("seed", "model", "text", "objective"))


def autoencoder_plan(recipe: Recipe, stage: AutoencoderStage, out: Path) -> Plan:
    """How an autoencoder stage is trained into a folder."""
    return _plan(recipe, stage, out, recipe.digest("seed", "autoencoder.net"))


def _plan(recipe: Recipe, phase: Phase, out: Path, sections: str) -> Plan:
    return Plan(
        out=out,
        identity=Identity(recipe.id, phase.name, stable_id(sections, json.dumps(phase.learned, sort_keys=True))),
        seed=_seed(recipe, phase),
        steps=phase.steps,
        checkpoint_every=phase.checkpoint_every,
        keep_checkpoints=phase.keep_checkpoints,
        ema_decay=phase.ema_decay,
        engine=phase.engine,
        guard=phase.guard,
        hang_seconds=phase.survival.hang_seconds,
        autoencoder=isinstance(phase, AutoencoderStage),
    )


def _seed(recipe: Recipe, phase: Phase) -> int:
    """A seed of its own for every stage, so that stages do not see their examples in the same order."""
    return int(stable_id(recipe.seed, phase.name)[:8], 16)
