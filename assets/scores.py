"""Scores: one column per scorer, kept for ever. A threshold never runs a scorer again."""

from assets.steps import Entry, Step
from ml.recipe import Recipe


def score_steps(recipe: Recipe) -> list[Step]:
    """`scores`, a partition a shard."""
    return [
        Step(
            key=(recipe.name, "scores"),
            group="curation",
            description=f"What {', '.join(recipe.curation.scores)} say about every clip, with each scorer's revision.",
            work=Entry("ml.curate", "scores", recipe.compute.curate),
            purpose="data",
            recipe=recipe,
            reads=("curation.scores",),
            inputs={"clips": ((recipe.name, "clips"),)},
            partitioned=True,
            kinds=frozenset({"python", "opencv", "onnx"}),
            owner="team:data",
            table="scores",
        )
    ]
