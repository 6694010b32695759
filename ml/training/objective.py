"""From a recipe to what a transformer stage minimises."""

from ml.diffusion.draws import Conditioner
from ml.diffusion.process import build_process
from ml.models.inputs import Denoiser, Text
from ml.recipe import Recipe
from ml.sections import Stage
from ml.training.step import Denoising, Dropping, Geometry


def denoising(recipe: Recipe, stage: Stage, network: Denoiser, empty: Text) -> Denoising:
    """The objective of a stage; `empty` is the embedded empty prompt, a batch of one."""
    section = recipe.objective
    dropping = Dropping(section.drop_context, section.drop_pooled, *null_text(network, empty))
    causal = recipe.autoencoder.law != "group"
    conditioner = Conditioner(recipe.model.conditioning, stage.conditions, section, causal)
    geometry = Geometry(recipe.strides, recipe.network)
    return Denoising(build_process(section), network, conditioner, dropping, geometry)


def null_text(network: Denoiser, empty: Text) -> tuple[Text, bool]:
    """What stands for no text, a batch of one, and whether it borrows the mask of the prompt it stands for.

    A network's own null caption does (1.0 to 1.3: the original repeats the prompt's mask); an encoded empty prompt has
    its own.
    """
    own = network.null_context
    if own is None:
        return empty, False
    return Text(own.detach().float().cpu()[None], empty.pooled, empty.mask), True
