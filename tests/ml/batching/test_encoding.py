"""What is encoded beside a clip, and which words are embedded of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ml.architectures import Latent
from ml.batching.buckets import Bucketing
from ml.batching.datasets import ClipDataset
from ml.batching.encoding import BATCH_PIXELS, Encoder, captions_of, together
from ml.models.autoencoders.registry import build_autoencoder
from ml.recipe import Recipe


def encoder(recipe: Recipe) -> Encoder:
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder.net).eval().requires_grad_(False)
    network.latent = Latent(scale=2.0)
    return Encoder.of(recipe, network)


@pytest.fixture
def video() -> torch.Tensor:
    """Two clips of 5 frames."""
    return torch.rand(2, 3, 5, 48, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_ends_are_encoded_alone_and_a_picture_has_none(mini: Recipe, video: torch.Tensor) -> None:
    made = encoder(mini)
    found = made.encode(("a", "b"), video)
    assert list(found) == ["", "/head", "/tail"]
    for suffix, frames in (("/head", video[:, :, :1]), ("/tail", video[:, :, -1:])):
        torch.testing.assert_close(found[suffix], made.encode(("a", "b"), frames)[""])
    assert list(made.encode(("a", "b"), video[:, :, :1])) == [""]
    assert not any(latents.requires_grad for latents in found.values())


def test_damage_depends_on_the_name_alone(make_generation: Callable[..., Recipe], video: torch.Tensor) -> None:
    always = {"pixel_noise_chance": 1.0, "pixel_noise": 0.4, "spatial_chance": 1.0, "temporal_chance": 0.0}
    made = encoder(make_generation("v1_3", objective={"augmentation": always}))
    both = made.encode(("a", "b"), video)["/damaged"]
    turned = made.encode(("b", "a"), video.flip(0))["/damaged"].flip(0)
    torch.testing.assert_close(both, turned)
    assert not torch.allclose(both, made.encode(("a", "c"), video)["/damaged"], atol=1e-3)


def test_what_decides_the_latents_has_a_name_of_its_own(mini: Recipe, make_generation: Callable[..., Recipe]) -> None:
    made = encoder(mini)
    other = replace(made, seed=made.seed + 1)
    assert made.content("x") == encoder(mini).content("x") == other.content("x"), "nothing is drawn"
    assert made.content("x") != made.content("y")
    assert made.content("x") != replace(made, ends=False).content("x")
    always = {"pixel_noise_chance": 1.0, "pixel_noise": 0.4, "spatial_chance": 1.0, "temporal_chance": 0.0}
    drawn = encoder(make_generation("v1_3", objective={"augmentation": always}))
    assert drawn.content("x") != replace(drawn, seed=drawn.seed + 1).content("x")


def test_as_many_clips_go_together_as_pixels_allow() -> None:
    assert together(1, BATCH_PIXELS // 4) == 4
    assert together(3, BATCH_PIXELS // 4) == 1
    assert together(129, 768 * 1360) == 1


def test_captions_end_with_a_whole_frame_rate_in_2_0_only(make_recipe: Callable[..., Recipe], footage: Any) -> None:
    clips = ClipDataset(footage.dataset, footage.workspace, Bucketing(16, 5.0, 0))
    plain = make_recipe(sampling={"score": {"style": "none", "motion": None}})
    bare = captions_of(plain, clips.clips, clips.bucketing)
    assert captions_of(make_recipe(), clips.clips, clips.bucketing) == {
        n: f"{text}. 4 FPS." for n, text in bare.items()
    }
