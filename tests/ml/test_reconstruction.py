import pytest
from pydantic import ValidationError

from ml.reconstruction import Adversarial, AutoencoderLoss


def test_terms_are_off_unless_they_are_weighed() -> None:
    section = AutoencoderLoss(reconstruction=1.0)
    assert (section.perceptual, section.kl, section.identity, section.latent, section.adversarial) == (0, 0, 0, 0, None)


def test_defaults_of_the_adversary_are_those_of_1_3() -> None:
    section = Adversarial()
    assert (section.weight, section.layers, section.channels, section.dropout) == (0.5, 3, 64, 0.0)
    assert (section.lr, section.betas, section.start_step, section.adaptive) == (5e-6, (0.9, 0.999), 0, True)


@pytest.mark.parametrize(
    "given",
    [
        {"reconstruction": -1.0},
        {"reconstruction": 1.0, "gan": 0.5},
        {"reconstruction": 1.0, "adversarial": {"weight": 0}},
    ],
)
def test_negative_weights_and_unknown_terms_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AutoencoderLoss.model_validate(given)
