"""Every generation through every entry, in seconds: autoencoder stages, latents, transformer stages, samples, losses.

The recipes are the packaged `tiny` ones, made smaller still; what is checked is that each generation's own path is
walked: its autoencoder's parts, its conditions, its objective, its solver.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from infra.workspace import Workspace
from ml.batching.datasets import LatentDataset
from ml.batching.video import read_clip
from ml.encode import encode_latents
from ml.entry import Call
from ml.models.lpips import Lpips
from ml.models.weights import read_card
from ml.recipe import Recipe
from ml.sample import make_samples, measure_losses, measure_reconstruction
from ml.shapes import Size
from ml.train import train_autoencoder, train_stage

ONE_CORE = {"accelerators": "CPU:1", "nodes": 1, "price": "cpu-assume-2026"}
SMALL_DIT = {"hidden_size": 48, "num_heads": 2, "depth": 2}
SMALL_MMDIT = {**SMALL_DIT, "depth": 1, "depth_single_blocks": 1, "axes_dim": (4, 10, 10)}
SMALL_SD = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}

# (resolution, frames, autoencoder net, model) of each recipe's smallest twin.
SIZES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "v1_0": ("48x80", 4, SMALL_SD, {**SMALL_DIT, "input_size": (4, 6, 10)}),
    "v1_1": ("48x80", 4, SMALL_SD, SMALL_DIT),
    "v1_2": ("48x80", 8, {**SMALL_SD, "filters": 8, "channel_multipliers": (1, 1, 1, 1)}, SMALL_DIT),
    "v1_3": ("48x80", 5, {"ch": 8}, SMALL_DIT),
    "v2_0": ("48x80", 5, {**SMALL_SD, "latent_channels": 4}, SMALL_MMDIT),
    "v2_0_hc": ("64x96", 8, {"latent_channels": 16, "widths": (16, 16, 16, 16, 16, 16)}, SMALL_MMDIT),
}
MakeCall = Callable[..., Call]


def smallest(name: str) -> Recipe:
    """The tiny recipe of a generation with two steps a stage and networks of a few thousand parameters."""
    resolution, frames, net, model = SIZES[name]
    document = Recipe.load(name, "tiny").model_dump(mode="json")
    document["text"].update(max_tokens=8)
    document["autoencoder"]["net"].update(net)
    document["model"].update(model)
    shared = {"compute": ONE_CORE, "steps": 2, "checkpoint_every": 2}
    for stage in document["autoencoder"]["stages"]:
        stage.update(shared, batch=2, resolution=resolution, frames=min(stage["frames"], frames), tier="base")
    bucket = {"keep": 1.0, "keep_length": 1.0, "batch": 2}
    for stage in document["stages"]:
        stage.update(shared, buckets={resolution: {1: bucket, frames: bucket}}, tier="base")
    document["compute"] = dict.fromkeys(document["compute"], ONE_CORE)
    document["sampling"].update(resolution=resolution, frames=frames, steps=3, aspect="16:9")
    document["evaluation"].update(num_prompts=1, seeds=(0, 1), loss_timesteps=2, loss_clips=2)
    return Recipe.validate_document(document, name)


@pytest.mark.parametrize("name", SIZES)
def test_a_generation_trains_samples_and_is_measured(name: str, make_call: MakeCall, footage: Any) -> None:
    torch.set_num_threads(1)
    recipe = smallest(name)
    walked = Walked(recipe, make_call, footage)
    encoder = walked.autoencoder()
    latents = walked.run("latents", encode_latents, {"dataset": footage.dataset, "autoencoder": encoder})
    check_latents(recipe, LatentDataset(latents))
    checkpoints = walked.stages(latents, encoder)
    losses = walked.run(
        "losses",
        measure_losses,
        {"latents": latents, "checkpoint": checkpoints},
        stages=",".join(stage.name for stage in recipe.stages),
    )
    assert np.isfinite(pd.read_json(losses / "losses.json", typ="series")["held_out"])
    report = walked.run("reconstruction", measure_reconstruction, {"dataset": footage.dataset, "autoencoder": encoder})
    assert pd.read_json(report / "reconstruction.json", typ="series")["psnr"] > 5
    check_samples(recipe, walked.samples(encoder, checkpoints[-1]))


class Walked:
    """One recipe's folders, each made by the entry that makes it in Dagster's tasks."""

    def __init__(self, recipe: Recipe, make_call: MakeCall, footage: Any) -> None:
        self.recipe, self.make_call, self.footage = recipe, make_call, footage

    def run(self, op: str, work: Callable[[Call], None], inputs: dict[str, Any], out: str = "", **options: str) -> Path:
        call = self.make_call(op, self.recipe, out or op, inputs, **options)
        work(Call(op, self.recipe, self.footage.workspace, call.out, call.inputs, call.options, call.log))
        assert (call.out / "result.json").is_file()
        return call.out

    def autoencoder(self) -> Path:
        folder: Path | None = None
        for stage in self.recipe.autoencoder.stages:
            inputs = {"dataset": self.footage.dataset} | ({"init": folder} if folder else {})
            inputs |= {"lpips": self.lpips()} if stage.loss.perceptual else {}
            folder = self.run("autoencoder", train_autoencoder, inputs, stage.name, stage=stage.name)
        assert folder is not None
        assert read_card(folder).kind == self.recipe.autoencoder.kind
        return folder

    def lpips(self) -> Path:
        """A distance of random features: enough to train against, and nothing to download."""
        folder = Workspace(self.footage.workspace).root / "lpips"
        folder.mkdir(exist_ok=True)
        save_file(Lpips("alex").state_dict(), folder / "alex.safetensors")
        return folder

    def stages(self, latents: Path, autoencoder: Path) -> list[Path]:
        made: list[Path] = []
        for stage in self.recipe.stages:
            inputs = {"latents": latents, "autoencoder": autoencoder} | ({"init": made[-1]} if made else {})
            made.append(self.run("stage", train_stage, inputs, f"dit_{stage.name}", stage=stage.name))
        return made

    def samples(self, autoencoder: Path, checkpoint: Path) -> Path:
        prompts = Workspace(self.footage.workspace).root / "prompts"
        prompts.mkdir(exist_ok=True)
        (prompts / "prompts.json").write_text('["waves of colour drift slowly"]')
        inputs = {"prompts": prompts, "autoencoder": autoencoder, "checkpoint": checkpoint}
        return self.run("samples", make_samples, inputs)


def check_latents(recipe: Recipe, latents: LatentDataset) -> None:
    """Latents have the length that the recipe's law says, and unit spread."""
    frames = recipe.sampling.frames
    groups = latents.groups("train")
    assert {cell.frames for cell in groups} == {1, frames}
    spreads = []
    for cell, keys in groups.items():
        batch = latents.load(keys)
        assert batch.latents.shape[1:] == (
            recipe.autoencoder.latent_channels,
            *recipe.strides.grid(cell.size, cell.frames),
        )
        assert batch.text.mask.any(1).all()
        ends = recipe.model.conditioning in ("channels", "embed") and cell.frames > 1
        assert (batch.heads is not None) == (batch.tails is not None) == ends
        spreads.append(float(batch.latents.std()))
    assert 0.3 < np.mean(spreads) < 3


def check_samples(recipe: Recipe, folder: Path) -> None:
    """Two different clips of the recipe's length and size."""
    rows = pd.read_parquet(folder / "samples.parquet")
    clips = [read_clip(folder / row.path, None, Size(row.height, row.width)) for row in rows.itertuples()]
    assert [len(clip) for clip in clips] == [recipe.sampling.frames] * 2
    assert not np.array_equal(*clips)
