"""Latents and text embeddings: encoded once, keyed by what encoded them."""

from assets.autoencoder import autoencoder_key
from assets.steps import Entry, Step
from ml.recipe import Recipe


def latent_steps(recipe: Recipe) -> list[Step]:
    """`latents` of every (clip, bucket) that any stage trains on, and the text embeddings of every caption."""
    return [
        Step(
            key=(recipe.name, "latents"),
            group="encoding",
            description="Latent and text-embedding shards of every bucket of every stage, with the encoders' digests.",
            work=Entry("ml.encode", "latents", recipe.compute.encode),
            purpose="data",
            recipe=recipe,
            reads=(
                "text",
                "seed",
                "dataset.fps_max",
                "sampling.score.style",
                "model.kind",
                "model.patch",
                "model.conditioning",
                *_augmentation(recipe),
                *_buckets(recipe),
            ),
            inputs={"dataset": ((recipe.name, "dataset_version"),), "autoencoder": (autoencoder_key(recipe),)},
            kinds=frozenset({"pytorch", "parquet"}),
            owner="team:training",
            table="latents",
            revision=2,
        )
    ]


def _augmentation(recipe: Recipe) -> list[str]:
    """Damage to clips happens before they are encoded (1.3)."""
    return ["objective.augmentation"] if recipe.objective.kind == "rectified_flow" else []


def _buckets(recipe: Recipe) -> list[str]:
    """What decides which clip is encoded in which shape: buckets, or without stages what is sampled."""
    if not recipe.stages:
        return ["sampling.resolution", "sampling.frames"]
    return [f"stages.{stage.name}.{field}" for stage in recipe.stages for field in ("buckets", "tier")]
