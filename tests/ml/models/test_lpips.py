from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ml.models.lpips import SCALE, SHIFT, Lpips, LpipsError, load_lpips, of_state


def weights(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.rand_like(tensor) if name.startswith("heads") else torch.randn_like(tensor) * 0.05
        for name, tensor in Lpips(kind).state_dict().items()
    }


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain_alexnet(state: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The features of torchvision's AlexNet, written out."""
    x, taps = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None], []
    for index, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
        if index in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        x = F.relu(F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding))
        taps.append(x)
    return taps


def test_alexnet_lpips_is_the_formula() -> None:
    state, one, other = weights("alex"), pictures(1), pictures(2)
    wanted = torch.zeros(2)
    for index, (a, b) in enumerate(zip(plain_alexnet(state, one), plain_alexnet(state, other), strict=True)):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        wanted += ((a - b).square() * state[f"heads.{index}.weight"][:, None, None]).sum(1).mean((1, 2))
    torch.testing.assert_close(of_state(state)(one, other), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "convolutions"), [("alex", 5), ("vgg", 13)])
def test_equal_pictures_are_at_distance_zero_and_noise_moves_them_apart(kind: str, convolutions: int) -> None:
    network = of_state(weights(kind))
    assert len(network.features) == convolutions
    one = pictures(1)
    near, far = (network(one, (one + s * torch.randn(one.shape)).clamp(-1, 1)) for s in (0.02, 0.5))
    assert network(one, one).tolist() == [0.0, 0.0]
    assert bool((near < far).all())
    assert bool((near > 0).all())


def test_gradients_reach_the_pictures_and_not_the_weights() -> None:
    one = pictures(1).requires_grad_()
    network = of_state(weights("alex"))
    network(one, pictures(2)).sum().backward()
    assert float(one.grad.abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_weights_are_read_from_a_file_and_wrong_ones_are_named(tmp_path: Path) -> None:
    state = weights("alex")
    save_file(state, tmp_path / "alex.safetensors")
    one, other = pictures(1), pictures(2)
    assert torch.equal(load_lpips(tmp_path / "alex.safetensors")(one, other), of_state(state)(one, other))
    with pytest.raises(LpipsError, match="no LPIPS weights at"):
        load_lpips(tmp_path / "missing.safetensors")
    with pytest.raises(LpipsError, match="holds 4 convolutions"):
        of_state({name: tensor for name, tensor in state.items() if "4" not in name})
    with pytest.raises(LpipsError, match="does not fit LPIPS on alex"):
        of_state({**state, "heads.0.weight": torch.zeros(7)})


def test_vgg_layers_are_those_of_vgg16() -> None:
    taps = Lpips("vgg").taps(pictures(1))
    assert [(t.shape[1], t.shape[2]) for t in taps] == [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]
    assert isinstance(Lpips("vgg").features[0], nn.Conv2d)
