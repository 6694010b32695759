"""Training stages: one checkpoint asset per stage of the recipe, each on the one before."""

from assets.steps import Entry, Step
from ml.recipe import Recipe
from ml.sections import Stage

_TRAINING = ("tier", "steps", "buckets", "conditions", "optimizer", "ema_decay", "engine")


def checkpoint_key(recipe: Recipe, stage: Stage) -> tuple[str, str]:
    """Asset key of a stage's checkpoint: `v2_0/dit_stage1`."""
    return (recipe.name, f"dit_{stage.name}")


def checkpoint_steps(recipe: Recipe) -> list[Step]:
    """One step per stage. Prices, hardware and published figures are not part of what a checkpoint is."""
    before = (None, *recipe.stages[:-1])
    return [_stage(recipe, stage, previous) for previous, stage in zip(before, recipe.stages, strict=True)]


def _stage(recipe: Recipe, stage: Stage, before: Stage | None) -> Step:
    init = {"init": (checkpoint_key(recipe, before),)} if before else {}
    return Step(
        key=checkpoint_key(recipe, stage),
        group="training",
        description=f"Transformer stage `{stage.name}`: {stage.steps} steps at {', '.join(stage.buckets)}.",
        work=Entry("ml.train", "stage", stage.compute),
        purpose="headline",
        recipe=recipe,
        reads=("seed", "model", "objective", "text", *(f"stages.{stage.name}.{field}" for field in _TRAINING)),
        inputs={"latents": ((recipe.name, "latents"),)} | init,
        options={"stage": stage.name},
        kinds=frozenset({"pytorch", "mlflow"}),
        owner="team:training",
    )
