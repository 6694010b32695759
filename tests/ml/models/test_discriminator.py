import pytest
import torch

from ml.models.discriminator import PatchDiscriminator, discriminator_hinge, generator_hinge


@pytest.mark.parametrize(
    ("layers", "dropout", "widths"),
    [(3, 0.0, [64, 128, 256, 512, 1]), (5, 0.3, [64, 128, 256, 512, 512, 512, 1])],
)
def test_names_and_shapes_are_those_of_both_releases(layers: int, dropout: float, widths: list[int]) -> None:
    """Index of each convolution: 1.3 has (conv, norm, relu) triples, main a dropout after each."""
    stride = 4 if dropout else 3
    with torch.device("meta"):
        found = {n: tuple(t.shape) for n, t in PatchDiscriminator(layers, dropout=dropout).state_dict().items()}
    wanted: dict[str, tuple[int, ...]] = {"main.0.weight": (64, 3, 3, 3, 3), "main.0.bias": (64,)}
    for layer in range(1, layers + 1):
        place = 2 + stride * (layer - 1)
        wanted[f"main.{place}.weight"] = (widths[layer], widths[layer - 1], 3, 3, 3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"main.{place + 1}.{name}"] = (widths[layer],)
        wanted[f"main.{place + 1}.num_batches_tracked"] = ()
    last = 2 + stride * layers
    wanted |= {f"main.{last}.weight": (1, widths[-2], 3, 3, 3), f"main.{last}.bias": (1,)}
    assert found == wanted


@pytest.mark.parametrize(
    ("frames", "layers", "patches"), [(17, 3, (5, 8, 8)), (1, 3, (1, 8, 8)), (8, 5, (2, 2, 2)), (1, 1, (1, 32, 32))]
)
def test_clips_and_pictures_have_a_logit_per_patch(frames: int, layers: int, patches: tuple[int, int, int]) -> None:
    network = PatchDiscriminator(layers, channels=4)
    assert network(torch.zeros(2, 3, frames, 64, 64)).shape == (2, 1, *patches)


def test_one_patch_alone_is_refused_in_training() -> None:
    network = PatchDiscriminator(5, channels=4)
    with pytest.raises(ValueError, match="sees one patch of 32 px"):
        network(torch.zeros(1, 3, 1, 32, 32))
    assert network(torch.zeros(2, 3, 1, 32, 32)).shape == (2, 1, 1, 1, 1)
    assert network.eval()(torch.zeros(1, 3, 1, 32, 32)).shape == (1, 1, 1, 1, 1)


def test_weights_start_small_and_centred() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(3, channels=16)
    state = network.state_dict()
    assert float(state["main.5.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["main.6.weight"].mean()) == pytest.approx(1.0, abs=0.02)
    assert float(state["main.6.bias"].abs().max()) == 0


def test_hinge_losses_are_the_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert float(generator_hinge(fake)) == pytest.approx(2 / 3)
