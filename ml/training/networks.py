"""Networks ready to be used: the autoencoder and the transformer of a recipe, from the folders of their stages."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ml.architectures import Latent
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.autoencoders.registry import load_autoencoder
from ml.models.networks import Network, build_network, load_network
from ml.recipe import Recipe

# Latents of this many batches give the scale: the standard deviation of 100 clips is known to about 1 %.
SCALE_BATCHES = 25
# Autoencoders whose latents are normalised channel by channel, as their authors did; the others share one number.
PER_CHANNEL = ("opensora_v1_2", "opensora_v1_3")


def open_autoencoder(recipe: Recipe, folder: Path) -> VideoAutoencoder:
    """The frozen autoencoder of a step folder, trained or imported, which tiles large inputs as its section says.

    Raises CheckpointMismatch for another recipe's.
    """
    autoencoder = load_autoencoder(folder, recipe.autoencoder, recipe.id).eval().requires_grad_(False)
    autoencoder.tile(True)
    return autoencoder


def open_transformer(recipe: Recipe, folder: Path | None) -> Network:
    """The frozen transformer of a stage's folder, or the untrained one (seeded by the recipe) without a folder.

    Raises CheckpointMismatch for one of another recipe.
    """
    network = new_transformer(recipe)
    if folder is not None:
        load_network(folder, network, recipe.id)
    return network.eval().requires_grad_(False)


def new_transformer(recipe: Recipe) -> Network:
    """The transformer of a recipe with the initial weights of the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return build_network(recipe.network)


@torch.no_grad()
def measured_latent(autoencoder: VideoAutoencoder, kind: str, videos: Iterable[Tensor]) -> Latent:
    """How to give the posterior means of the first videos [B,3,T,H,W] a standard deviation of 1.

    Over all channels together by Stable Diffusion's rule (arXiv 2112.10752, appendix G), or mean and deviation of each
    channel for the kinds in `PER_CHANNEL` (om/vae_v1_3/constants.py, 1.3).
    """
    device = next(autoencoder.parameters()).device
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for video in islice(videos, SCALE_BATCHES):
        mean = autoencoder.posterior(video.to(device))[0].double().transpose(0, 1).flatten(1).cpu()
        count, total, squares = count + mean.shape[1], total + mean.sum(1), squares + mean.square().sum(1)
    if kind in PER_CHANNEL:
        centre = total / count
        deviation = (squares / count - centre.square()).sqrt()
        return Latent(mean=tuple(centre.tolist()), std=tuple(deviation.tolist()))
    overall = squares.mean() / count - (total.mean() / count) ** 2
    return Latent(scale=float(overall**-0.5))
