"""Shots and clips: where the cuts are, and the files cut there."""

from assets.steps import Entry, Step
from ml.recipe import Recipe


def clip_steps(recipe: Recipe) -> list[Step]:
    """`shots` and `clips`, each a partition a shard."""
    videos = tuple(("corpus", name) for name in recipe.corpus.names)
    shots = Step(
        key=(recipe.name, "shots"),
        group="curation",
        description="Spans between two cuts, found by PySceneDetect's detector on frames decoded small.",
        work=Entry("ml.curate", "shots", recipe.compute.curate),
        purpose="data",
        recipe=recipe,
        reads=("curation.shots",),
        inputs={"videos": videos},
        partitioned=True,
        kinds=frozenset({"python", "opencv"}),
        owner="team:data",
        table="shots",
    )
    clips = Step(
        key=(recipe.name, "clips"),
        group="curation",
        description="Clip files of the recipe's length, frame rate and size, each written once under a stable id.",
        work=Entry("ml.curate", "clips", recipe.compute.curate),
        purpose="data",
        recipe=recipe,
        reads=("curation.clips", "corpus.licences"),
        inputs={"videos": videos, "shots": (shots.key,)},
        partitioned=True,
        kinds=frozenset({"python", "ffmpeg"}),
        owner="team:data",
        table="clips",
    )
    return [shots, clips]
