"""Videos of a network in training, by the real sampler, autoencoder and text encoder."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ml.models.autoencoders.registry import build_autoencoder
from ml.models.text import build_text_encoder
from ml.recipe import Recipe
from ml.sampling.generator import Generator, Networks
from ml.sampling.preview import Remembered, Sampled, shape_of
from ml.sampling.requests import Request
from ml.training.held_out import Asked
from ml.training.networks import new_transformer

CPU = torch.device("cpu")
TEXT = {"kind": "minilm", "max_tokens": 12, "context_dim": 384, "pooled_dim": 384}
PROMPTS = ("a red wave", "a blue wave", "a green wave")
SECTION = {"every": 2, "clips": 3, "timesteps": 2, "sampling_steps": 2, "prompts": PROMPTS[:2]}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(text=TEXT, stage={"validation": SECTION})


@pytest.fixture(scope="module")
def networks(recipe: Recipe) -> Networks:
    torch.manual_seed(0)
    transformer = new_transformer(recipe).requires_grad_(True)
    for weight in transformer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    autoencoder = build_autoencoder(recipe.autoencoder.net).eval().requires_grad_(False)
    return Networks(transformer.eval(), autoencoder, build_text_encoder(recipe.text))


def test_a_preview_is_what_the_sampler_makes_in_as_many_steps(recipe: Recipe, networks: Networks) -> None:
    preview = Sampled(recipe, recipe.stage("stage1"), networks.autoencoder, networks.text)
    assert preview.prompts == PROMPTS[:2]
    asked = Asked(networks.transformer, networks.transformer, CPU)
    few = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 2})})
    wanted = Generator(few, networks).videos(Request(PROMPTS[1]), [recipe.evaluation.seeds[0]])[0]
    found = preview(asked, PROMPTS[1])
    assert found.shape == (5, 48, 80, 3)
    assert np.array_equal(found, wanted)


def test_a_wrapped_network_in_bf16_is_called_through_its_wrapper(recipe: Recipe, networks: Networks) -> None:
    transformer = new_transformer(recipe).to(torch.bfloat16).eval()
    calls = []

    class Wrapper(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            calls.append(torch.is_inference_mode_enabled())
            return transformer(**given)

    preview = Sampled(recipe, recipe.stage("stage1"), networks.autoencoder, networks.text)
    frames = preview(Asked(Wrapper(), transformer, CPU, torch.bfloat16), PROMPTS[0])
    assert (frames.dtype, frames.shape) == (np.uint8, (5, 48, 80, 3))
    assert calls == [False] * len(calls)
    assert len(calls) >= 2


def test_a_network_can_be_trained_after_it_was_sampled(recipe: Recipe, networks: Networks) -> None:
    """Nothing that the network keeps between calls is a tensor of inference mode."""
    preview = Sampled(recipe, recipe.stage("stage1"), networks.autoencoder, networks.text)
    network = new_transformer(recipe)
    calls = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    preview(Asked(network, network, CPU), PROMPTS[0])
    hook.remove()
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in calls[0].items()}
    network(**given).square().mean().backward()
    assert any(weight.grad is not None for weight in network.parameters())


def test_videos_are_of_the_largest_size_that_is_trained(make_recipe: Callable[..., Recipe]) -> None:
    bucket = {"keep": 1.0, "batch": 1}
    for buckets, longest, wanted in (
        ({"64px": {1: bucket, 17: bucket, 33: bucket}}, 17, ("64px", 17)),
        ({"64px": {1: bucket, 17: bucket}, "96px": {1: bucket, 33: bucket}}, 17, ("96px", 33)),
        ({"64px": {1: bucket, 17: bucket}, "96px": {1: bucket}}, 99, ("64px", 17)),
        ({"64px": {1: bucket}, "96px": {1: bucket}}, 17, ("96px", 1)),
    ):
        assert shape_of(make_recipe(stage={"buckets": buckets}).stage("stage1"), longest) == wanted


def test_prompts_are_embedded_once(networks: Networks) -> None:
    held = Remembered(networks.text, PROMPTS)
    assert held.digest == networks.text.digest
    assert torch.equal(held.encode(PROMPTS[:2]).context, networks.text.encode(PROMPTS[:2]).context)
    with pytest.raises(KeyError):
        held.encode(["another"])
