"""Calls as the originals take them: by position, of 1.3 without windows, with tokens of two frames."""

from typing import Any

import pytest
import torch

from ml.models.mmdit import MMDiT
from ml.models.positional import named
from ml.models.stdit3 import STDiT3
from ml.models.stdit_layers import MarkedFramesError, check_marked

SIZES: dict[str, Any] = {"hidden_size": 48, "num_heads": 4, "depth": 2}
TINY: dict[str, Any] = {**SIZES, "caption_channels": 10, "model_max_length": 7}
WINDOWED: dict[str, Any] = {**TINY, "kernel_size": (2, 3, -1), "use_spatial_rope": True}
SHAPE = (2, 4, 3, 6, 10)


def _randomised(network: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def _network(**hyper: Any) -> STDiT3:
    made: STDiT3 = _randomised(STDiT3(**{**TINY, **hyper}))
    return made


def _call(**more: Any) -> dict[str, Any]:
    """Arguments of STDiT-3 in the original's order, x_mask aside."""
    g = torch.Generator().manual_seed(1)
    call = {"x": torch.randn(SHAPE, generator=g), "timestep": torch.tensor([17.5, 911.0])}
    call |= {"y": torch.randn(2, 1, 7, 10, generator=g), "mask": torch.ones(2, 7, dtype=torch.bool)}
    sizes = {"fps": 24.0, "height": 240.0, "width": 426.0}
    return {**call, **{name: torch.full((2,), number) for name, number in sizes.items()}, **more}


def _given(frames: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    cond, mask = torch.randn(SHAPE, generator=g), torch.ones(SHAPE)
    null = torch.randn(2, 1, 7, 10, generator=g)
    return {"cond": cond, "cond_mask": mask, "mask_index": frames, "y_null": null}


def test_positions_take_names_in_order_and_keywords_stay() -> None:
    assert named(("fps", "height", "width"), (24, 240), {"width": 426, "other": 1}) == {
        "fps": 24,
        "height": 240,
        "width": 426,
        "other": 1,
    }


def test_too_many_and_twice_named_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes 1 further arguments by position \(fps\)"):
        named(("fps",), (24, 240), {})
    with pytest.raises(TypeError, match="got fps by position and by name"):
        named(("fps", "height"), (24,), {"fps": 24})


@torch.no_grad()
def test_conditions_of_stdit3_may_follow_by_position_and_frames_as_a_tensor() -> None:
    network, call, given = _network(**WINDOWED), _call(), _given([0, 2])
    out = network(**call, **given)
    first = [call[name] for name in ("x", "timestep", "y", "mask")]
    rest = [{**call, **given}[name] for name in ("fps", "height", "width", "cond", "cond_mask", "mask_index", "y_null")]
    assert torch.equal(network(*first, None, *rest), out)
    assert torch.equal(network(**call, **{**given, "mask_index": torch.tensor([0, 2])}), out)
    nothing = network(**call, **{**given, "mask_index": torch.tensor([], dtype=torch.int64)})
    assert torch.equal(nothing, network(**call, **{**given, "mask_index": []}))


@torch.no_grad()
def test_conditions_of_mmdit_may_follow_by_position_and_others_are_ignored() -> None:
    ends = {"in_channels": 16, "vec_in_dim": 12, "context_in_dim": 20, "axes_dim": (4, 4, 4)}
    network = _randomised(MMDiT(**SIZES, **ends, depth_single_blocks=1, cond_embed=True, guidance_embed=True))
    img, ids, txt = torch.randn(2, 6, 16), torch.randint(0, 5, (2, 6, 3)), torch.randn(2, 5, 20)
    first = (img, ids, txt, torch.zeros(2, 5, 3), torch.rand(2), torch.randn(2, 12))
    cond, guidance = torch.randn(2, 6, 20), torch.full((2,), 4.0)
    out = network(*first, cond=cond, guidance=guidance)
    assert torch.equal(network(*first, cond, guidance), out)
    assert torch.equal(network(*first, cond, guidance, num_frames=3), out)
    assert not torch.allclose(network(*first, cond, guidance + 3), out, atol=1e-3)


@torch.no_grad()
def test_the_image_model_of_1_3_embeds_its_condition_without_windows() -> None:
    """It has 1.3's names and, as 1.3, does not round the time: 999 is 1000 to 1.2 in bfloat16."""
    image, windowed = _network(skip_temporal=True, cond_embed=True), _network(**WINDOWED, skip_temporal=True)
    assert image.state_dict().keys() == windowed.state_dict().keys()
    call, given = _call(), _given([1])
    assert not torch.allclose(image(**call, **given), image(**call), atol=1e-3)
    times = {name: _call(timestep=torch.full((2,), number)) for name, number in (("odd", 999.0), ("even", 1000.0))}
    odd, even = (image.bfloat16()(**times[name]) for name in ("odd", "even"))
    assert not torch.equal(odd, even)
    older = _network(skip_temporal=True).bfloat16()
    assert torch.equal(older(**times["odd"]), older(**times["even"]))
    fresh = STDiT3(**TINY, cond_embed=True)
    assert not any(parameter.any() for parameter in fresh.x_embedder_cond.parameters())


@torch.no_grad()
def test_tokens_of_two_frames() -> None:
    network, call = _network(patch_size=(2, 2, 2)), _call()
    assert network(**call, x_mask=torch.tensor([[True, False]] * 2)).shape == (2, 8, 3, 6, 10)
    with pytest.raises(MarkedFramesError, match="joins 2 latent frames"):
        check_marked((2, 2, 2), torch.ones(2, 3, dtype=torch.bool))
    check_marked((2, 2, 2), None)
    check_marked((2, 2, 2), ())
    check_marked((1, 2, 2), (0, 1))
