"""Reports: held-out loss, VBench, human preference, and all of them under one protocol."""

from assets.autoencoder import LPIPS, autoencoder_key
from assets.checkpoints import checkpoint_key, last_checkpoint_key
from assets.steps import Entry, Function, Step
from evaluation.judge import preference_report, write_report
from evaluation.preference import votes_digest
from ml.recipe import Recipe

_PROTOCOL = ("prompts", "num_prompts", "seeds", "vbench_dimensions", "loss_timesteps", "loss_clips", "gate")


def report_steps(recipe: Recipe) -> list[Step]:
    """`loss_report`, `vbench_report`, `preference_report` and `report`."""
    return [_losses(recipe), _vbench(recipe), _preference(recipe), _report(recipe)]


def _losses(recipe: Recipe) -> Step:
    made = {stage.name: checkpoint_key(recipe, stage) for stage in recipe.stages}
    made = made or {"pretrained": last_checkpoint_key(recipe)}
    loss = "flow-matching" if recipe.objective.kind == "rectified_flow" else "noise-prediction"
    whose = "every stage" if recipe.stages else "the released weights"
    return Step(
        key=(recipe.name, "loss_report"),
        group="judgement",
        description=f"Held-out {loss} loss of {whose} beside the untrained model's, by timestep and bucket.",
        work=Entry("ml.sample", "losses", recipe.compute.evaluate),
        purpose="eval",
        recipe=recipe,
        reads=("evaluation.loss_timesteps", "evaluation.loss_clips", "objective", "seed"),
        inputs={"latents": ((recipe.name, "latents"),), "checkpoint": tuple(made.values())},
        options={"stages": ",".join(made)},
        kinds=frozenset({"pytorch"}),
        owner="team:evaluation",
    )


def _vbench(recipe: Recipe) -> Step:
    return Step(
        key=(recipe.name, "vbench_report"),
        group="judgement",
        description="VBench by its own package in its own environment; what cannot run is absent, with the reason.",
        work=Entry("evaluation.judge", "vbench", recipe.compute.evaluate),
        purpose="eval",
        recipe=recipe,
        reads=("evaluation.vbench_dimensions",),
        inputs={"samples": ((recipe.name, "samples"),)},
        kinds=frozenset({"vbench", "pytorch"}),
        owner="team:evaluation",
    )


def _preference(recipe: Recipe) -> Step:
    return Step(
        key=(recipe.name, "preference_report"),
        group="judgement",
        description="Blind pairwise votes so far on visual quality, prompt adherence and motion, with intervals.",
        work=Function(preference_report, billed=False),
        purpose="label",
        recipe=recipe,
        reads=("seed",),
        inputs={"samples": ((recipe.name, "samples"),)},
        kinds=frozenset({"python"}),
        owner="team:evaluation",
        fingerprint=lambda workspace, partition: votes_digest(workspace, recipe.id),
    )


def _report(recipe: Recipe) -> Step:
    name = recipe.name
    parts = (
        "loss_report",
        "reconstruction_report",
        "vbench_report",
        "preference_report",
        "samples",
        "latents",
        "prompts",
    )
    return Step(
        key=(name, "report"),
        group="judgement",
        description="Every metric of the last checkpoint under one protocol; unequal protocols never compare.",
        work=Function(write_report),
        purpose="eval",
        recipe=recipe,
        reads=("sampling", "compute.sample.accelerators", *(f"evaluation.{field}" for field in _PROTOCOL)),
        inputs={part: ((name, part),) for part in parts}
        | {
            "checkpoint": (last_checkpoint_key(recipe),),
            "autoencoder": (autoencoder_key(recipe),),
            "lpips": (LPIPS,),
        },
        kinds=frozenset({"python", "markdown"}),
        owner="team:evaluation",
    )
