"""Samples: the fixed prompt set, and the videos that the last checkpoint makes of it with recorded seeds."""

import json

from assets.autoencoder import autoencoder_key
from assets.checkpoints import last_checkpoint_key
from assets.steps import Entry, Function, Step
from evaluation.prompts import load
from ml.entry import Call
from ml.recipe import Recipe

SOLVERS = {"euler": "Euler", "ddpm": "DDPM", "dpm_solver": "DPM-Solver++"}


def sample_steps(recipe: Recipe) -> list[Step]:
    """`prompts` and `samples`."""
    prompts = Step(
        key=(recipe.name, "prompts"),
        group="judgement",
        description=f"The first {recipe.evaluation.num_prompts} prompts of set `{recipe.evaluation.prompts}`.",
        work=Function(_write_prompts, billed=False),
        purpose="eval",
        recipe=recipe,
        reads=("evaluation.prompts", "evaluation.num_prompts"),
        kinds=frozenset({"json"}),
        owner="team:evaluation",
        fingerprint=lambda workspace, partition: load(recipe.evaluation.prompts).digest,
    )
    solver = SOLVERS[recipe.sampling.solver]
    samples = Step(
        key=(recipe.name, "samples"),
        group="judgement",
        description=f"Videos for every prompt and seed, {recipe.sampling.steps} {solver} steps, guided.",
        work=Entry("ml.sample", "samples", recipe.compute.sample),
        purpose="eval",
        recipe=recipe,
        reads=("sampling", "evaluation.seeds", "text", "objective"),
        inputs={
            "prompts": (prompts.key,),
            "checkpoint": (last_checkpoint_key(recipe),),
            "autoencoder": (autoencoder_key(recipe),),
        },
        kinds=frozenset({"pytorch", "ffmpeg"}),
        owner="team:evaluation",
    )
    return [prompts, samples]


def _write_prompts(call: Call) -> None:
    """Write `prompts.json`, the texts in order, and the digest that a report's protocol names."""
    chosen = load(call.recipe.evaluation.prompts).first(call.recipe.evaluation.num_prompts)
    (call.out / "prompts.json").write_text(json.dumps(chosen.texts, indent=2), encoding="utf-8")
    call.finish({"num_prompts": len(chosen.texts)}, facts={"set": chosen.name, "digest": chosen.digest})
