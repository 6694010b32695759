"""From a recipe's stage to the plan of its training: seeds, cadence, and whose checkpoints may be resumed."""

from pathlib import Path

from ml.manifest import stable_id
from ml.recipe import Recipe
from ml.sections import AutoencoderStage, Engine, Stage
from ml.training.checkpoint import Identity
from ml.training.trainer import Plan

# The autoencoder is trained in fp32 without accumulation; its stages have no engine section.
AUTOENCODER_ENGINE = Engine(
    kind="plain", precision="fp32", grad_clip=1.0, accumulate=1, sequence_parallel=1, checkpoint_blocks=(0, 0)
)
KEEP_AUTOENCODER_CHECKPOINTS = 2
# What a stage costs, and how often it saves, does not change what it learns: a checkpoint survives such edits.
NOT_TRAINING = {"compute", "published", "utilisation", "checkpoint_every", "keep_checkpoints"}


def stage_plan(recipe: Recipe, stage: Stage, out: Path) -> Plan:
    """How a transformer stage is trained into a folder."""
    sections = recipe.digest("seed", "model", "text", "objective")
    return Plan(
        out=out,
        identity=_identity(recipe, stage, sections),
        seed=_seed(recipe, stage),
        steps=stage.steps,
        accumulate=stage.engine.accumulate,
        checkpoint_every=stage.checkpoint_every,
        keep_checkpoints=stage.keep_checkpoints,
        ema_decay=stage.ema_decay,
    )


def autoencoder_plan(recipe: Recipe, stage: AutoencoderStage, out: Path) -> Plan:
    """How an autoencoder stage is trained into a folder."""
    network = recipe.autoencoder.net.model_dump_json()
    return Plan(
        out=out,
        identity=_identity(recipe, stage, recipe.digest("seed"), network),
        seed=_seed(recipe, stage),
        steps=stage.steps,
        accumulate=AUTOENCODER_ENGINE.accumulate,
        checkpoint_every=stage.checkpoint_every,
        keep_checkpoints=KEEP_AUTOENCODER_CHECKPOINTS,
        ema_decay=stage.ema_decay,
    )


def _identity(recipe: Recipe, stage: Stage | AutoencoderStage, *decides: str) -> Identity:
    return Identity(recipe.id, stage.name, stable_id(*decides, stage.model_dump_json(exclude=NOT_TRAINING)))


def _seed(recipe: Recipe, stage: Stage | AutoencoderStage) -> int:
    """A seed of its own for every stage, so that stages do not see their examples in the same order."""
    return int(stable_id(recipe.seed, stage.name)[:8], 16)
