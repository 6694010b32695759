"""Captions of the kept clips, with who wrote them, on what instruction, at which revision."""

from assets.steps import Entry, Step
from ml.recipe import Recipe


def caption_steps(recipe: Recipe) -> list[Step]:
    """`captions` of every kept clip."""
    return [
        Step(
            key=(recipe.name, "captions"),
            group="curation",
            description=f"Training text by captioner `{recipe.curation.captions.captioner}`, after caption hygiene.",
            work=Entry("ml.curate", "captions", recipe.compute.curate),
            purpose="caption",
            recipe=recipe,
            reads=("curation.captions",),
            inputs={"curated": ((recipe.name, "curated"),)},
            kinds=frozenset({"python"}),
            owner="team:data",
            table="captions",
        )
    ]
