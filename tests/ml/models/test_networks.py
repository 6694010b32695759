"""Every transformer by its kind: what is built, written, read back and refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ml.models.inputs import Inputs, Text, denoise
from ml.models.networks import build_network, load_network, num_parameters, save_network
from ml.models.weights import WEIGHTS, CheckpointMismatch, Origin, read_card
from ml.recipe import Recipe

KINDS = {"v1_0": "stdit", "v1_1": "stdit2", "v1_2": "stdit3", "v1_3": "stdit3", "v2_0": "mmdit"}
Generation = Callable[..., Recipe]


@pytest.fixture
def recipe(request: pytest.FixtureRequest, make_generation: Generation, mini: Recipe) -> Recipe:
    """The small recipe of a generation."""
    return mini if request.param == "v2_0" else make_generation(request.param)


def drawn(recipe: Recipe, seed: int = 0) -> torch.nn.Module:
    """A network whose zero-initialised layers say something too."""
    torch.manual_seed(seed)
    network = build_network(recipe.network).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def told(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, Inputs]:
    generator = torch.Generator().manual_seed(1)
    frames, section = recipe.sampling.frames, recipe.text
    x = torch.randn(
        2, recipe.autoencoder.latent_channels, recipe.strides.latent_frames(frames), 6, 10, generator=generator
    )
    context = torch.randn(2, section.max_tokens, section.context_dim, generator=generator)
    mask = torch.arange(section.max_tokens)[None] < torch.tensor([[2], [3]])
    text = Text(context, torch.randn(2, section.pooled_dim, generator=generator), mask)
    return x, torch.tensor([0.3, 0.6]), Inputs(text, 48, 80, frames, torch.tensor([12.0, 24.0]))


@pytest.mark.parametrize("name", KINDS)
def test_a_published_network_is_built_without_its_weights(name: str) -> None:
    """Parameters of 1.x at released sizes are 0.7 to 1.2 billion, of 2.0 twelve; names and shapes only on `meta`."""
    with torch.device("meta"):
        network = build_network(Recipe.load(name, "paper").network)
    billions = num_parameters(network) / 1e9
    assert 11 < billions < 13 if name == "v2_0" else 0.6 < billions < 1.3
    assert all(p.is_meta for p in network.parameters())


@pytest.mark.parametrize("recipe", KINDS, indirect=True)
def test_what_is_written_says_the_same_when_read_back(recipe: Recipe, tmp_path: Path) -> None:
    network = drawn(recipe)
    save_network(tmp_path, network, Origin(recipe.id, "stage1"))
    other = build_network(recipe.network).eval()
    card = load_network(tmp_path, other, recipe.id)
    assert (card.kind, card.origin) == (recipe.model.kind, Origin(recipe.id, "stage1"))
    x, t, inputs = told(recipe)
    with torch.no_grad():
        one, two = (denoise(n, n, x, t, inputs) for n in (network, other))
    assert torch.equal(one, two)
    assert one.shape[0] == 2
    assert one.shape[1] in (x.shape[1], 2 * x.shape[1])
    assert one.shape[2:] == x.shape[2:]


@pytest.mark.parametrize("recipe", ["v1_0", "v1_1", "v1_2", "v1_3"], indirect=True)
def test_the_null_caption_is_written_though_nobody_trains_it(recipe: Recipe, tmp_path: Path) -> None:
    """It is a buffer: an average of the trained weights does not hold it, and must not take its place."""
    network = drawn(recipe)
    average = {name: parameter + 1 for name, parameter in network.named_parameters()}
    save_network(tmp_path, network, Origin(recipe.id, "stage1"), average)
    written = load_file(tmp_path / WEIGHTS)
    assert written.keys() == network.state_dict().keys()
    assert torch.equal(written["y_embedder.y_embedding"], network.state_dict()["y_embedder.y_embedding"])
    assert all(torch.equal(written[name], tensor) for name, tensor in average.items())
    assert "y_embedder.y_embedding" not in average
    null = network.null_context
    assert null is not None
    assert null.shape == (recipe.text.max_tokens, recipe.text.context_dim)
    assert torch.equal(null, written["y_embedder.y_embedding"])


def test_2_0_holds_no_null_caption(mini: Recipe) -> None:
    assert build_network(mini.network).null_context is None


def test_buffers_do_not_count_as_parameters(make_generation: Generation) -> None:
    network = build_network(make_generation("v1_1").network)
    assert num_parameters(network) == sum(p.numel() for _, p in network.named_parameters())
    assert num_parameters(network) < sum(tensor.numel() for tensor in network.state_dict().values())


def test_weights_of_another_recipe_kind_or_size_are_refused(
    make_generation: Generation, mini: Recipe, tmp_path: Path
) -> None:
    recipe = make_generation("v1_2")
    network = drawn(recipe)
    save_network(tmp_path, network, Origin(recipe.id, "stage1"))
    with pytest.raises(CheckpointMismatch, match="recipe is 'v1_2-tiny', wanted 'v1_3-tiny'"):
        load_network(tmp_path, build_network(recipe.network), "v1_3-tiny")
    with pytest.raises(CheckpointMismatch, match="kind is 'stdit3', wanted 'mmdit'"):
        load_network(tmp_path, build_network(mini.network), recipe.id)
    deeper = make_generation("v1_2", model={"depth": 2})
    with pytest.raises(CheckpointMismatch, match="config depth is 1, wanted 2"):
        load_network(tmp_path, build_network(deeper.network), recipe.id)
    windowed = make_generation("v1_3")
    with pytest.raises(CheckpointMismatch, match="config kernel_size is None, wanted"):
        load_network(tmp_path, build_network(windowed.network), recipe.id)


def test_the_card_rebuilds_the_network(make_generation: Generation, tmp_path: Path) -> None:
    recipe = make_generation("v1_3")
    save_network(tmp_path, build_network(recipe.network), Origin(recipe.id, "stage2"))
    config = dict(read_card(tmp_path).config)
    assert type(recipe.network).model_validate(config) == recipe.network


def test_samples_of_a_batch_do_not_see_each_other(make_generation: Generation) -> None:
    """Captions of other lengths stand packed beside each other in 1.x: each sample sees its own."""
    for name in ("v1_0", "v1_1", "v1_2", "v1_3"):
        recipe = make_generation(name)
        network = drawn(recipe)
        x, t, inputs = told(recipe)
        alone = replace(inputs, text=_rows(inputs.text, slice(1, 2)), fps=inputs.fps[1:])
        with torch.no_grad():
            both = denoise(network, network, x, t, inputs)
            one = denoise(network, network, x[1:], t[1:], alone)
        torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


def _rows(text: Text, rows: slice) -> Text:
    return Text(text.context[rows], text.pooled[rows], text.mask[rows])
