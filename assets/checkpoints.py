"""Training stages: one checkpoint asset per stage of the recipe, each on the one before, or released weights alone."""

from assets.autoencoder import autoencoder_key
from assets.steps import Entry, Function, Step
from ml.entry import Call
from ml.recipe import Recipe
from ml.released import source_fingerprint
from ml.sections import Pretrained, Stage


def checkpoint_key(recipe: Recipe, stage: Stage) -> tuple[str, str]:
    """Asset key of a stage's checkpoint: `v2_0/dit_stage1`."""
    return (recipe.name, f"dit_{stage.name}")


def last_checkpoint_key(recipe: Recipe) -> tuple[str, str]:
    """Asset key of what is sampled, judged and released: the last stage, or the released weights where none follows."""
    return checkpoint_key(recipe, recipe.stages[-1]) if recipe.stages else pretrained_key(recipe)


def pretrained_key(recipe: Recipe) -> tuple[str, str]:
    """Asset key of the released weights that a recipe starts from."""
    return (recipe.name, "pretrained")


def checkpoint_steps(recipe: Recipe) -> list[Step]:
    """Released weights where the recipe starts from them, then one step per stage.

    Prices, hardware and published figures are not part of what a checkpoint is.
    """
    made = [] if recipe.pretrained is None else [_pretrained(recipe, recipe.pretrained)]
    for stage in recipe.stages:
        made.append(_stage(recipe, stage, made[-1].key if made else None))
    return made


def _pretrained(recipe: Recipe, wanted: Pretrained) -> Step:
    use = "that stage 1 starts from" if recipe.stages else "as they are"
    return Step(
        key=pretrained_key(recipe),
        group="training",
        description=f"Released transformer weights {use}, every name checked and converted.",
        work=Function(_import),
        purpose="storage",
        recipe=recipe,
        reads=("seed", "model", "text", "autoencoder.net", "pretrained"),
        kinds=frozenset({"pytorch"}),
        owner="team:training",
        fingerprint=lambda workspace, partition: source_fingerprint(workspace.root, wanted.uri),
    )


def _import(call: Call) -> None:
    """Check and place the released weights; the import stands here because it brings torch."""
    from ml.released import import_transformer

    import_transformer(call)


def _stage(recipe: Recipe, stage: Stage, before: tuple[str, str] | None) -> Step:
    init = {"init": (before,)} if before else {}
    return Step(
        key=checkpoint_key(recipe, stage),
        group="training",
        description=f"Transformer stage `{stage.name}`: {stage.steps} steps at {', '.join(stage.buckets)}.",
        work=Entry("ml.train", "stage", stage.compute),
        purpose="headline",
        recipe=recipe,
        reads=("seed", "model", "objective", "text", f"stages.{stage.name}.learned"),
        inputs=_inputs(recipe, stage) | init,
        # What only validation looks at decides nothing.
        aside=frozenset({"latents"} if stage.loading.source == "clips" else {"autoencoder"}),
        options={"stage": stage.name},
        kinds=frozenset({"pytorch", "mlflow"}),
        owner="team:training",
    )


def _inputs(recipe: Recipe, stage: Stage) -> dict[str, tuple[tuple[str, str], ...]]:
    """Latents, or the clips and what encodes them; and what validation looks at."""
    online = stage.loading.source == "clips"
    found: dict[str, tuple[tuple[str, str], ...]]
    found = {"dataset": ((recipe.name, "dataset_version"),)} if online else {"latents": ((recipe.name, "latents"),)}
    if stage.validation is not None:
        found["latents"] = ((recipe.name, "latents"),)
    if online or (stage.validation is not None and stage.validation.prompts):
        found["autoencoder"] = (autoencoder_key(recipe),)
    return found
