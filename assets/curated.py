"""Curated clips: thresholds and duplicates applied over all shards, every dropped clip with its reason."""

from assets.steps import Entry, Step
from ml.recipe import Recipe


def curated_steps(recipe: Recipe) -> list[Step]:
    """`curated`, the first table over all shards, with the funnel."""
    return [
        Step(
            key=(recipe.name, "curated"),
            group="curation",
            description="Keep flag and reason of every clip, near-duplicates found across shards, and the funnel.",
            work=Entry("ml.curate", "filter", recipe.compute.curate),
            purpose="data",
            recipe=recipe,
            reads=("curation.keep", "corpus.licences"),
            inputs={"clips": ((recipe.name, "clips"),), "scores": ((recipe.name, "scores"),)},
            kinds=frozenset({"python", "pandas"}),
            owner="team:data",
            table="curated",
        )
    ]
