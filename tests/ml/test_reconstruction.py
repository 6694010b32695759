"""What a recipe may say about an autoencoder's losses; what they compute is tests/ml/training."""

from typing import Any

import pytest
from pydantic import ValidationError

from ml.recipe import Recipe
from ml.reconstruction import Adversarial, AutoencoderLoss


def test_only_the_pixels_count_unless_more_is_said() -> None:
    loss = AutoencoderLoss(reconstruction=1.0)
    assert (loss.perceptual, loss.kl, loss.identity, loss.latent, loss.adversarial) == (0, 0, 0, 0, None)
    with pytest.raises(ValidationError, match="reconstruction"):
        AutoencoderLoss()  # type: ignore[call-arg]


def test_the_adversary_of_1_3_is_the_default() -> None:
    """cfg/vae_v1_3/train: hinge, three layers, weight 0.5 from step 0, AdamW at 5e-6."""
    made = Adversarial()
    assert (made.loss, made.layers, made.weight, made.start_step, made.lr) == ("hinge", 3, 0.5, 0, 5e-6)
    assert made.adaptive


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        (AutoencoderLoss, {"reconstruction": -1.0}),
        (AutoencoderLoss, {"reconstruction": 1.0, "kl": -1e-6}),
        (AutoencoderLoss, {"reconstruction": 1.0, "perceptal": 0.1}),
        (Adversarial, {"weight": 0}),
        (Adversarial, {"start_step": -1}),
        (Adversarial, {"dropout": 1.0}),
        (Adversarial, {"loss": "wasserstein"}),
        (Adversarial, {"layers": 0}),
    ],
)
def test_what_makes_no_loss_is_refused(section: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section(**fields)


def test_the_parts_of_1_2_are_trained_as_published() -> None:
    """The 2-D half stands still first, with identity loss on pictures; then without; then all by pixels (docs/vae.md).

    Its stage before those, which trains the 2-D half itself, is ours: there are no released weights to start from.
    """
    stages = [stage for stage in Recipe.load("v1_2", "tiny").autoencoder.stages if stage.part != "spatial"]
    assert [stage.part for stage in stages] == ["temporal", "temporal", "all"]
    assert [stage.loss.identity > 0 for stage in stages] == [True, False, False]
    assert [stage.loss.latent > 0 for stage in stages] == [True, True, False]
    assert [stage.random_frames for stage in stages] == [False, False, True]


def test_recipes_with_an_adversary_are_those_whose_autoencoder_had_one() -> None:
    names = ("v1_0", "v1_1", "v1_2", "v1_3", "v2_0", "v2_0_hc")
    stages = {name: Recipe.load(name, "tiny").autoencoder.stages for name in names}
    with_one = {name for name, found in stages.items() if any(stage.loss.adversarial for stage in found)}
    assert with_one == {"v1_3", "v2_0_hc"}
