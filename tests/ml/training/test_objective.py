"""From a recipe to what its stage minimises."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ml.batching.datasets import LatentDataset
from ml.diffusion.iddpm import IDDPM
from ml.diffusion.rectified_flow import RectifiedFlow
from ml.models.networks import build_network
from ml.recipe import Recipe
from ml.training.objective import denoising, null_text

Generation = Callable[..., Recipe]
Latents = Callable[[Recipe], Path]


@pytest.mark.parametrize("name", ["v1_0", "v1_1", "v1_2", "v1_3"])
def test_1_x_drops_to_its_own_null_caption(make_generation: Generation, make_latents: Latents, name: str) -> None:
    recipe = make_generation(name)
    network = build_network(recipe.network)
    empty = LatentDataset(make_latents(recipe)).null
    null, keeps_mask = null_text(network, empty)
    assert keeps_mask
    assert torch.equal(null.context[0], network.state_dict()["y_embedder.y_embedding"])
    assert not null.context.requires_grad
    made = denoising(recipe, recipe.stages[0], network, empty)
    assert made.dropping.keeps_mask
    assert (made.dropping.context, made.dropping.pooled) == (0.1, 0.0)


def test_2_0_drops_to_the_encoded_empty_prompt(mini: Recipe, latents: Path) -> None:
    network = build_network(mini.network)
    empty = LatentDataset(latents).null
    null, keeps_mask = null_text(network, empty)
    assert (null is empty, keeps_mask) == (True, False)
    made = denoising(mini, mini.stages[0], network, empty)
    assert made.dropping.context == made.dropping.pooled == pytest.approx(0.31622777)


def test_process_and_conditions_are_the_recipes(
    make_generation: Generation, make_latents: Latents, mini: Recipe, latents: Path
) -> None:
    kinds = {}
    for name in ("v1_0", "v1_1", "v1_2", "v1_3", "v2_0"):
        recipe = mini if name == "v2_0" else make_generation(name)
        network = build_network(recipe.network)
        empty = LatentDataset(latents if name == "v2_0" else make_latents(recipe)).null
        made = denoising(recipe, recipe.stages[1], network, empty)
        assert made.conditioner.kinds == recipe.stages[1].conditions
        assert made.conditioner.causal
        assert made.geometry.strides == recipe.strides
        kinds[name] = (type(made.process), made.conditioner.conditioning)
    assert kinds == {
        "v1_0": (IDDPM, "none"),
        "v1_1": (IDDPM, "mask"),
        "v1_2": (RectifiedFlow, "mask"),
        "v1_3": (RectifiedFlow, "embed"),
        "v2_0": (RectifiedFlow, "channels"),
    }


def test_groups_of_frames_are_no_causal_chain(latents: Path) -> None:
    """DC-AE encodes no first frame apart: 32 given frames are 8 latents, not 9."""
    recipe = Recipe.load("v2_0_hc", "tiny")
    small = recipe.model_copy(update={"model": recipe.model.model_copy(update={"depth": 1, "depth_single_blocks": 1})})
    network = build_network(small.network)
    made = denoising(small, small.stages[0], network, LatentDataset(latents).null)
    assert not made.conditioner.causal
