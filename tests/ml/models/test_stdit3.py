"""STDiT-3: released names and sizes, masks, given frames, windows, recomputation, and the house's call."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ml.architectures import STDiT3 as STDiT3Section
from ml.models.inputs import Inputs, Text, denoise
from ml.models.stdit3 import IMAGE_FPS, STDiT3, STDiT3Error
from ml.models.stdit_layers import PackedText
from ml.models.weights import Origin

TINY: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 10, "model_max_length": 7}
WINDOWED: dict[str, Any] = {**TINY, "kernel_size": (2, 3, -1), "use_spatial_rope": True}
SHAPE = (2, 4, 3, 6, 10)


def _network(**hyper: Any) -> STDiT3:
    """A tiny network whose every parameter is random, so that nothing is silently zero."""
    torch.manual_seed(0)
    network = STDiT3(**{**TINY, **hyper}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def _call(shape: tuple[int, ...] = SHAPE, **more: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    batch = shape[0]
    call = {
        "x": torch.randn(shape, generator=g),
        "timestep": torch.tensor([17.5, 911.0, 400.0])[:batch],
        "y": torch.randn(batch, 1, 7, 10, generator=g),
        "mask": torch.arange(7)[None] < torch.tensor([4, 7, 1])[:batch, None],
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 240.0),
        "width": torch.full((batch,), 426.0),
    }
    return {**call, **more}


def _given(frames: list[int], shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    mask = torch.zeros(shape)
    mask[:, :, frames] = 1
    cond = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * mask
    y_null = torch.randn(shape[0], 1, 7, 10, generator=torch.Generator().manual_seed(3))
    return {"cond": cond, "cond_mask": mask, "mask_index": frames, "y_null": y_null}


def _released(d: int, head: int, channels: int, windowed: bool) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released weights, from the fact sheet; depth 28, text 300 tokens of 4096."""
    linears: dict[str, tuple[int, ...]] = {"t_block.1": (6 * d, d), "final_layer.linear": (8 * channels, d)}
    rest: dict[str, tuple[int, ...]] = {"final_layer.scale_shift_table": (2, d), "y_embedder.y_embedding": (300, 4096)}
    linears |= {"y_embedder.y_proj.fc1": (d, 4096), "y_embedder.y_proj.fc2": (d, d)}
    for name in ("t_embedder", "fps_embedder"):
        linears |= {f"{name}.mlp.0": (d, 256), f"{name}.mlp.2": (d, d)}
    for name in ("x_embedder", "x_embedder_cond", "x_embedder_cond_mask")[: 3 if windowed else 1]:
        linears[f"{name}.proj"] = (d, channels, 1, 2, 2)
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)):
        rest[f"{block}.scale_shift_table"] = (6, d)
        rest |= {f"{block}.attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        linears |= {f"{block}.attn.qkv": (3 * d, d), f"{block}.cross_attn.kv_linear": (2 * d, d)}
        linears |= {f"{block}.{name}": (d, d) for name in ("attn.proj", "cross_attn.q_linear", "cross_attn.proj")}
        linears |= {f"{block}.mlp.fc1": (4 * d, d), f"{block}.mlp.fc2": (d, 4 * d)}
    rest["rope.freqs"] = (head // 6 if windowed else head // 2,)
    rest |= {f"{name}.weight": shape for name, shape in linears.items()}
    return rest | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


@pytest.mark.parametrize(
    ("hyper", "sizes", "millions"),
    [
        ({}, (1152, 72, 4, False), 1207.6),
        ({"hidden_size": 1872, "num_heads": 26}, (1872, 72, 4, False), 3182.2),
        ({"in_channels": 16, "kernel_size": (8, 8, -1), "use_spatial_rope": True}, (1152, 72, 16, True), 1208.0),
    ],
    ids=["1.2 XL/2", "1.2 3B/2", "1.3 XL/2"],
)
def test_names_shapes_and_size_are_the_released_ones(
    hyper: dict[str, Any], sizes: tuple[int, int, int, bool], millions: float
) -> None:
    with torch.device("meta"):
        network = STDiT3(**hyper)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == _released(*sizes)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_rotary_frequencies_are_those_of_a_head_and_of_a_third_of_it() -> None:
    whole, third = STDiT3(**TINY).rope.freqs, STDiT3(**WINDOWED).rope.freqs
    torch.testing.assert_close(whole, torch.tensor([10_000 ** (-2 * i / 12) for i in range(6)]))
    torch.testing.assert_close(third, torch.tensor([10_000 ** (-2 * i / 4) for i in range(2)]))


def test_time_and_rate_meet_before_the_blocks_and_positions_follow_the_pixels() -> None:
    """The first block gets patches + positions, and t_block of (time + rate); both written out here."""
    network, call, seen = _network(), _call(), {}
    network.spatial_blocks[0].register_forward_pre_hook(lambda _, args: seen.update(args=args))
    network(**call)
    tokens, moment = seen["args"][0], seen["args"][1]

    def embedded(embedder: Any, number: Tensor) -> Tensor:
        angles = number[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        return embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

    t = embedded(network.t_embedder, call["timestep"]) + embedded(network.fps_embedder, call["fps"])
    torch.testing.assert_close(moment.now, network.t_block[1](torch.nn.functional.silu(t)), rtol=1e-4, atol=1e-4)
    scale, base = math.sqrt(240 * 426) / 512, round(math.sqrt(15))
    lanes = 10_000 ** -(torch.arange(0, 24, 2) / 24)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        across, down = column / scale * base / 5 * lanes, row / scale * base / 3 * lanes
        position = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()])
        patch = call["x"][1, :, 2, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        weight = network.x_embedder.proj.weight[:, :, 0]
        expected = (weight * patch).sum((1, 2, 3)) + network.x_embedder.proj.bias + position
        torch.testing.assert_close(tokens[1, 2, row * 5 + column], expected, rtol=1e-5, atol=1e-5)


# --- masks and given frames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", [{}, WINDOWED], ids=["1.2", "1.3"])
@torch.no_grad()
def test_all_frames_active_equals_no_mask(hyper: dict[str, Any]) -> None:
    network = _network(**hyper)
    plain = network(**_call())
    assert plain.shape == (2, 8, 3, 6, 10)
    assert plain.dtype == torch.float32
    everything = network(**_call(x_mask=torch.ones(2, 3, dtype=torch.bool)))
    torch.testing.assert_close(everything, plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clean_frames_do_not_hear_the_time() -> None:
    """Up to the final layer (which norms a clean frame by t and again by 0), with no attention between frames."""
    network, active = _network(skip_temporal=True), torch.tensor([[True, False, True], [False, True, True]])
    seen: list[Tensor] = []
    network.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(**_call(x_mask=active))
    network(**_call(x_mask=active, timestep=torch.tensor([700.0, 3.0])))
    torch.testing.assert_close(seen[0][~active], seen[1][~active])
    assert (seen[0] - seen[1])[active].abs().amax(dim=(1, 2)).min() > 1e-2


@torch.no_grad()
def test_padding_of_text_is_never_heard() -> None:
    network, call = _network(), _call()
    other = call["y"].clone()
    other[0, :, 4:] = 99.0
    assert torch.equal(network(**call), network(**{**call, "y": other}))


@torch.no_grad()
def test_given_frames_hear_the_null_text_only() -> None:
    """Frame 1 is given: the prompt leaves its result alone and the null text changes it; the others the other way."""
    network, call, given = _network(**WINDOWED, skip_temporal=True), _call(), _given([1])
    plain = network(**call, **given)
    other_prompt = network(**{**call, "y": call["y"] + 1}, **given)
    other_null = network(**call, **{**given, "y_null": given["y_null"] + 1})
    assert torch.equal(plain[:, :, 1], other_prompt[:, :, 1])
    assert torch.equal(plain[:, :, [0, 2]], other_null[:, :, [0, 2]])
    assert (plain - other_prompt)[:, :, [0, 2]].abs().amax(dim=(1, 3, 4)).min() > 1e-2
    assert (plain - other_null)[:, :, 1].abs().amax() > 1e-2


@torch.no_grad()
def test_every_frame_given_hears_no_prompt() -> None:
    network, call, given = _network(**WINDOWED), _call(), _given([2, 0, 1])
    assert torch.equal(network(**call, **given), network(**{**call, "y": -call["y"]}, **given))


@torch.no_grad()
def test_a_fresh_network_is_deaf_to_the_condition_the_rate_and_its_temporal_blocks() -> None:
    torch.manual_seed(0)
    network, call, given = STDiT3(**WINDOWED).eval(), _call(), _given([0])
    given["y_null"] = call["y"]
    plain = network(**call)
    assert plain.abs().mean() > 0.1
    torch.testing.assert_close(network(**call, **given), plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(network(**{**call, "fps": torch.full((2,), 120.0)}), plain)
    image_model = STDiT3(**WINDOWED, skip_temporal=True).eval()
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("temporal_blocks")}
    image_model.load_state_dict(kept, strict=True)
    assert torch.equal(image_model(**call), plain)
    assert not any(network.x_embedder_cond.proj.bias.tolist() + network.x_embedder_cond_mask.proj.bias.tolist())


@torch.no_grad()
def test_the_condition_is_added_to_the_tokens_only_when_frames_are_named() -> None:
    """An empty mask_index adds the embedders' biases, as the original does; None leaves them out."""
    network, call, nothing = _network(**WINDOWED), _call(), _given([])
    seen: list[Tensor] = []
    network.spatial_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(**call)
    network(**call, **nothing)
    biases = network.x_embedder_cond.proj.bias + network.x_embedder_cond_mask.proj.bias
    torch.testing.assert_close(seen[1] - seen[0], biases.expand_as(seen[0]), rtol=1e-4, atol=1e-5)


# --- shapes, windows, switches ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_frames_that_look_alike_come_out_alike_and_their_order_matters() -> None:
    network, call = _network(), _call()
    out = network(**{**call, "x": call["x"][:, :, :1].expand(SHAPE)})
    torch.testing.assert_close(out[:, :, 0], out[:, :, 2], rtol=1e-4, atol=1e-4)
    order = [2, 0, 1]
    turned, straight = network(**{**call, "x": call["x"][:, :, order]}), network(**call)[:, :, order]
    assert (turned - straight).abs().max() > 1e-3


@torch.no_grad()
def test_windows_that_cover_everything_equal_one_window() -> None:
    """A kernel larger than the grid is padded and masked; it must equal the kernel of the grid's own size."""
    fitting, roomy = (
        _network(**{**WINDOWED, "kernel_size": (3, 5, -1)}),
        _network(**{**WINDOWED, "kernel_size": (8, 8, 4)}),
    )
    torch.testing.assert_close(roomy(**_call()), fitting(**_call()), rtol=1e-4, atol=1e-4)
    cut = _network(**{**WINDOWED, "kernel_size": (2, 3, -1)})
    assert not torch.allclose(cut(**_call()), fitting(**_call()), atol=1e-2)


@pytest.mark.parametrize("hyper", [{}, WINDOWED], ids=["1.2", "1.3"])
@torch.no_grad()
def test_odd_sizes_come_back_whole(hyper: dict[str, Any]) -> None:
    shape = (2, 4, 2, 5, 7)
    out = _network(**hyper)(**_call(shape))
    assert out.shape == (2, 8, 2, 5, 7)
    assert out.isfinite().all()


@torch.no_grad()
def test_rows_are_padded_for_a_forced_divisor() -> None:
    """Three rows of tokens become four; positions and attention see four, so it equals a latent of 8 rows."""
    network, call = _network(**WINDOWED, force_pad_h_for_sp_size=4), _call(**_given([1]))
    out = network(**call)
    taller = {name: torch.nn.functional.pad(call[name], (0, 0, 0, 2)) for name in ("x", "cond", "cond_mask")}
    assert torch.equal(out, _network(**WINDOWED)(**{**call, **taller})[:, :, :, :6])


@torch.no_grad()
def test_cached_features_replace_the_caption_embedder() -> None:
    network, cached, call = _network(), _network(skip_y_embedder=True), _call()
    features = network.y_embedder(call["y"]).squeeze(1)[call["mask"]][None]
    out = cached(**{**call, "y": features, "mask": torch.tensor([4, 7])})
    torch.testing.assert_close(out, network(**call), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.null_context, network.y_embedder(network.null_context))


@torch.no_grad()
def test_pixels_are_multiplied_as_numbers_whatever_their_dtype() -> None:
    network = _network()
    wide = {"height": torch.full((2,), 720.0), "width": torch.full((2,), 1280.0)}
    out = network(**_call(**wide))
    for dtype in (torch.float16, torch.bfloat16, torch.int16):
        assert torch.equal(network(**_call(**{name: pixels.to(dtype) for name, pixels in wide.items()})), out)


def test_freezing_and_image_models() -> None:
    trainable = {name for name, p in STDiT3(**TINY, only_train_temporal=True).named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in STDiT3(**TINY).named_parameters() if n.startswith("temporal_blocks.")}
    frozen = {name for name, p in STDiT3(**TINY, freeze_y_embedder=True).named_parameters() if not p.requires_grad}
    assert frozen == {f"y_embedder.y_proj.fc{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    image_model = STDiT3(**TINY, skip_temporal=True)
    assert not [name for name in image_model.state_dict() if name.startswith("temporal")]


def test_initialisation_is_the_reported_one() -> None:
    torch.manual_seed(0)
    network = STDiT3(**{**TINY, "hidden_size": 96})
    for block in network.temporal_blocks:
        assert not any(layer.weight.any() for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2))
    for block in network.spatial_blocks:
        assert all(layer.weight.any() for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2))
    assert network.fps_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not network.fps_embedder.mlp[2].weight.any()
    assert network.t_block[1].weight.abs().max() <= math.sqrt(6 / (7 * 96))
    assert network.spatial_blocks[0].scale_shift_table.std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert network.y_embedder.y_embedding.std().item() == pytest.approx(10**-0.5, rel=0.3)


@pytest.mark.parametrize("hyper", [{}, WINDOWED], ids=["1.2", "1.3"])
def test_recomputing_leaves_outputs_and_gradients_equal(hyper: dict[str, Any]) -> None:
    network = _network(**hyper).train()
    call = _call(x_mask=torch.tensor([[True, False, True]] * 2), **(_given([0]) if hyper else {}))

    def step(checkpoint_blocks: tuple[int, int]) -> tuple[Tensor, list[Tensor | None]]:
        network.checkpoint_blocks = checkpoint_blocks
        network.zero_grad()
        out = network(**call)
        out.square().mean().backward()
        return out, [parameter.grad for parameter in network.parameters()]

    out, grads = step((0, 0))
    again, regrads = step((1, 0))
    assert torch.equal(out, again)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    for one, two in zip(grads, regrads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_only_the_named_pairs_recompute() -> None:
    network, runs = _network().train(), []
    for kind in ("spatial", "temporal"):
        for index, block in enumerate(getattr(network, f"{kind}_blocks")):
            block.mlp.register_forward_hook(lambda *_, name=f"{kind}{index}": runs.append(name))
    network.checkpoint_blocks = (1, 0)
    network(**_call()).mean().backward()
    assert sorted(runs) == ["spatial0", "spatial0", "spatial1", "temporal0", "temporal0", "temporal1"]


def test_bad_input_is_refused_with_the_reason() -> None:
    windowed, plain = _network(**WINDOWED), _network()
    with pytest.raises(STDiT3Error, match="needs fps, height too"):
        plain(**{name: value for name, value in _call().items() if name not in ("fps", "height")})
    with pytest.raises(STDiT3Error, match="only a network that embeds its condition"):
        plain(**_call(**_given([0])))
    with pytest.raises(STDiT3Error, match=r"\(3,\) names frames outside 0 to 2"):
        windowed(**_call(**{**_given([0]), "mask_index": [3]}))
    with pytest.raises(STDiT3Error, match="needs y_null too"):
        windowed(**_call(**{**_given([0]), "y_null": None}))
    for hyper, reason in (
        ({"use_spatial_rope": True}, "give kernel_size too"),
        ({"only_train_temporal": True, "skip_temporal": True}, "nothing to train"),
        ({"kernel_size": (8, 8, -1), "qk_norm_legacy": True}, "never windowed"),
        ({"widht": 3}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=reason):
            STDiT3(**{**TINY, **hyper})


# --- the house's call ------------------------------------------------------------------------------------------------


def _inputs(**more: Any) -> Inputs:
    call = _call()
    text = Text(call["y"][:, 0], torch.zeros(2, 1), call["mask"])
    return Inputs(**{"text": text, "height": 240, "width": 426, "frames": 9, "fps": torch.full((2,), 24.0), **more})


@torch.no_grad()
def test_the_house_calls_the_forward_as_the_original_does() -> None:
    network, call, active = _network(), _call(), torch.tensor([[True, False, True]] * 2)
    out = denoise(network, network, call["x"], call["timestep"], _inputs(active=active, given=(1,)))
    assert torch.equal(out, network(**call, x_mask=active))
    image = network.arguments(call["x"], call["timestep"], _inputs(frames=1))
    assert image["fps"].tolist() == [IMAGE_FPS] * 2 == [120.0] * 2


@torch.no_grad()
def test_the_house_passes_given_frames_to_the_windowed_network() -> None:
    network, call, given = _network(**WINDOWED), _call(), _given([0, 2])
    condition = torch.cat([given["cond_mask"][:, :1], given["cond"]], dim=1)
    given["y_null"] = network.null_context.expand(2, 1, -1, -1)
    out = denoise(network, network, call["x"], call["timestep"], _inputs(condition=condition, given=(0, 2)))
    assert torch.equal(out, network(**call, **given))
    nothing = denoise(network, network, call["x"], call["timestep"], _inputs(condition=torch.zeros_like(condition)))
    assert torch.equal(nothing, network(**call))
    with pytest.raises(STDiT3Error, match="no condition is"):
        network.arguments(call["x"], call["timestep"], _inputs(given=(0,)))


@torch.no_grad()
def test_the_house_packs_cached_features() -> None:
    network = _network(**WINDOWED, skip_y_embedder=True)
    features = torch.randn(2, 7, 48)
    text = Text(features, torch.zeros(2, 1), _call()["mask"])
    call = network.arguments(_call()["x"], _call()["timestep"], _inputs(text=text))
    packed = PackedText(call["y"][0], call["mask"])
    assert packed.lengths == [4, 7]
    assert torch.equal(packed.tokens, torch.cat([features[0, :4], features[1]]))
    condition = torch.zeros(2, 5, 3, 6, 10)
    given = denoise(
        network, network, _call()["x"], _call()["timestep"], _inputs(text=text, condition=condition, given=(1,))
    )
    assert given.shape == (2, 8, 3, 6, 10)


def test_the_card_rebuilds_the_network() -> None:
    network = STDiT3(**WINDOWED)
    card = network.card(Origin("v1_3-tiny", "stage1"))
    assert card.kind == "stdit3"
    rebuilt = STDiT3(STDiT3Section.model_validate(card.config))
    assert rebuilt.config == network.config
    rebuilt.load_state_dict(network.state_dict(), strict=True)
