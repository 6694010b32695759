"""Networks ready to be used: the autoencoder and the transformer of a recipe, from the folders of their stages."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ml.models.autoencoders.hunyuan import VideoAutoencoder, load_autoencoder
from ml.models.mmdit import MMDiT, build_mmdit, load_mmdit
from ml.recipe import Recipe

# Latents of this many batches give the scale: the standard deviation of 100 clips is known to about 1 %.
SCALE_BATCHES = 25


def open_autoencoder(recipe: Recipe, folder: Path) -> VideoAutoencoder:
    """The frozen autoencoder of a step folder, trained or imported, which tiles large inputs to bound memory.

    Raises CheckpointMismatch for another recipe's.
    """
    autoencoder = load_autoencoder(folder, recipe.autoencoder, recipe.id).eval().requires_grad_(False)
    autoencoder.tile(True)
    return autoencoder


def open_transformer(recipe: Recipe, folder: Path | None) -> MMDiT:
    """The frozen transformer of a stage's folder, or the untrained one (seeded by the recipe) without a folder.

    Raises CheckpointMismatch for one of another recipe.
    """
    network = new_transformer(recipe)
    if folder is not None:
        load_mmdit(folder, network, recipe.id)
    return network.eval().requires_grad_(False)


def new_transformer(recipe: Recipe) -> MMDiT:
    """The transformer of a recipe with the initial weights of the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return build_mmdit(recipe.model, recipe.text, recipe.autoencoder.latent_channels)


@torch.no_grad()
def measured_scale(autoencoder: VideoAutoencoder, videos: Iterable[Tensor]) -> float:
    """1 / standard deviation of the posterior means of the first videos [B,3,T,H,W]: scaled latents then have about 1.

    Stable Diffusion's rule (arXiv 2112.10752, appendix G), over all channels together.
    """
    count, total, squares, device = 0, 0.0, 0.0, next(autoencoder.parameters()).device
    for video in islice(videos, SCALE_BATCHES):
        mean = autoencoder.posterior(video.to(device))[0].double()
        count, total, squares = count + mean.numel(), total + float(mean.sum()), squares + float(mean.square().sum())
    return float((squares / count - (total / count) ** 2) ** -0.5)
