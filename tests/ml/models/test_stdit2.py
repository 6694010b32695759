"""STDiT-2 (1.1): its names and size at paper size, one block against plain einsum, and what it is told of a clip."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ml import architectures
from ml.models.inputs import Inputs, Text, denoise
from ml.models.sequence import HERE
from ml.models.stdit2 import ClipFactsMissing, STDiT2
from ml.models.stdit_layers import MarkedFramesError, Moment, PackedText
from ml.models.weights import Origin

SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 8, "model_max_length": 5}
SMALL |= {"qk_norm": True, "input_sq_size": 512}
FACTS = {"num_frames": 3.0, "height": 32.0, "width": 48.0, "ar": 1.5, "fps": 8.0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _network(**hyper: Any) -> STDiT2:
    """A small network none of whose parameters is zero."""
    network = STDiT2(**{**SMALL, **hyper})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def _given(size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 4, *size),
        "timestep": torch.tensor([999.0, 31.0]),
        "y": torch.randn(2, 1, 5, 8),
        "mask": torch.arange(5) < torch.tensor([[2], [5]]),
        **{name: torch.full((2,), fact) for name, fact in FACTS.items()},
    }


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def _normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def _heard(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L,N,D], [M,N,D], [M,N,D] -> [L,N D]."""
    scores = torch.einsum("lnd,mnd->nlm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("nlm,mnd->lnd", scores.softmax(-1), value).flatten(1)


def _turned(x: Tensor) -> Tensor:
    """[L,N,12] with every pair of lanes, as a complex number, times e^(i position frequency)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:2], 6, 2).contiguous())
    angles = torch.arange(len(x))[:, None, None] * 10_000.0 ** (-torch.arange(0, 12, 2) / 12)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)


def _self_attention(state: dict[str, Tensor], name: str, x: Tensor, turn: bool) -> Tensor:
    query, key, value = _linear(state, f"{name}.qkv", x).reshape(len(x), 3, 2, 12).unbind(1)
    if turn:
        query, key = _turned(query), _turned(key)
    scales = (state[f"{name}.q_norm.weight"], state[f"{name}.k_norm.weight"])
    query, key = (
        part * scale / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        for part, scale in zip((query, key), scales, strict=True)
    )
    return _linear(state, f"{name}.proj", _heard(query, key, value))


def _block(state: dict[str, Tensor], x: Tensor, spatial: list[Tensor], temporal: list[Tensor], text: Tensor) -> Tensor:
    """One sample [T,S,D]; `spatial` and `temporal` hold what modulates each frame."""
    six = torch.stack([state["scale_shift_table"] + vec.reshape(6, -1) for vec in spatial], dim=1)[:, :, None]
    three = torch.stack([state["scale_shift_table_temporal"] + v.reshape(3, -1) for v in temporal], dim=1)[:, :, None]
    inner = _normed(x) * (1 + six[1]) + six[0]
    x = x + six[2] * torch.stack([_self_attention(state, "attn", frame, turn=False) for frame in inner])
    inner = _normed(x) * (1 + three[1]) + three[0]
    series = [_self_attention(state, "attn_temp", inner[:, s], turn=True) for s in range(x.shape[1])]
    x = x + three[2] * torch.stack(series, dim=1)
    key, value = _linear(state, "cross_attn.kv_linear", text).reshape(-1, 2, 2, 12).unbind(1)
    query = _linear(state, "cross_attn.q_linear", x).reshape(-1, 2, 12)
    x = x + _linear(state, "cross_attn.proj", _heard(query, key, value)).reshape(x.shape)
    hidden = _linear(state, "mlp.fc1", _normed(x) * (1 + six[4]) + six[3])
    return x + six[5] * _linear(state, "mlp.fc2", torch.nn.functional.gelu(hidden, approximate="tanh"))


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of STDiT2-XL/2, from the patterns of the released file."""
    width, third = 1152, 384

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "rope.freqs": (36,),
        "x_embedder.proj.weight": (width, 4, 1, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.y_embedding": (200, 4096),
        "final_layer.scale_shift_table": (2, width),
        **linear("t_block.1", 6 * width, width),
        **linear("t_block_temp.1", 3 * width, width),
        **linear("y_embedder.y_proj.fc1", width, 4096),
        **linear("y_embedder.y_proj.fc2", width, width),
        **linear("final_layer.linear", 32, width),
    }
    sizes = {"t_embedder": width, "fl_embedder": width, "fps_embedder": width, "csize_embedder": third}
    for name, size in {**sizes, "ar_embedder": third}.items():
        shapes |= linear(f"{name}.mlp.0", size, 256) | linear(f"{name}.mlp.2", size, size)
    for index in range(28):
        block = f"blocks.{index}"
        shapes |= {f"{block}.scale_shift_table": (6, width), f"{block}.scale_shift_table_temporal": (3, width)}
        for name in ("attn", "attn_temp"):
            shapes |= linear(f"{block}.{name}.qkv", 3 * width, width) | linear(f"{block}.{name}.proj", width, width)
            shapes |= {f"{block}.{name}.{norm}.weight": (72,) for norm in ("q_norm", "k_norm")}
        shapes |= linear(f"{block}.cross_attn.q_linear", width, width)
        shapes |= linear(f"{block}.cross_attn.kv_linear", 2 * width, width)
        shapes |= linear(f"{block}.cross_attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes


def test_names_and_shapes_are_the_released_ones_and_767_5_million_parameters_learn() -> None:
    with torch.device("meta"):
        network = STDiT2(architectures.STDiT2(input_sq_size=512, qk_norm=True, model_max_length=200))
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == _expected_shapes()
    # Buffers (null caption, rotary frequencies) are not counted; with them it is 768.3 million.
    assert sum(parameter.numel() for parameter in network.parameters()) == 767_452_064


def test_one_block_equals_plain_einsum_with_given_frames_at_time_zero() -> None:
    network = _network()
    block, x = network.blocks[0], torch.randn(2, 3, 6, 24)
    six, six0, three, three0 = (torch.randn(2, count * 24) for count in (6, 6, 3, 3))
    active = torch.tensor([[True, False, True], [False, False, True]])
    texts = [torch.randn(2, 24), torch.randn(5, 24)]
    text, rope = PackedText(torch.cat(texts), [2, 5]), network.rope(torch.arange(3))
    out = block(x, Moment(six, six0, active), Moment(three, three0, active), text, rope, HERE)
    for row in range(2):
        spatial = [six[row] if on else six0[row] for on in active[row]]
        temporal = [three[row] if on else three0[row] for on in active[row]]
        expected = _block(block.state_dict(), x[row], spatial, temporal, texts[row])
        assert torch.allclose(out[row], expected, rtol=1e-5, atol=2e-5)


def test_what_reaches_the_blocks_is_time_plus_size_and_time_plus_length() -> None:
    network, given = _network(depth=1), _given()
    seen: list[tuple[Any, ...]] = []
    network.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    network(**given, x_mask=torch.tensor([[True, True, False]] * 2))
    _, spatial, temporal, text, _, _ = seen[0]

    def embedded(name: str, number: Tensor | float) -> Tensor:
        number = torch.as_tensor(number)[None]
        angles = number * 10_000.0 ** -(torch.arange(128) / 128)
        hidden = _linear(state, f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        return _linear(state, f"{name}.mlp.2", torch.nn.functional.silu(hidden))

    state = network.state_dict()
    silu = torch.nn.functional.silu
    size = torch.cat([embedded("csize_embedder", n) for n in (32.0, 48.0)] + [embedded("ar_embedder", 1.5)])
    length = embedded("fl_embedder", 3.0) + embedded("fps_embedder", 8.0)
    for now, time in ((0, 31.0), (1, 0.0)):
        t = embedded("t_embedder", time)
        assert torch.allclose(spatial[now][1], _linear(state, "t_block.1", silu(t + size)), atol=1e-4)
        assert torch.allclose(temporal[now][1], _linear(state, "t_block_temp.1", silu(t + length)), atol=1e-4)
    assert text.lengths == [2, 5]


def test_given_frames_end_with_time_zero_and_size_active_ones_with_time_alone() -> None:
    network, given = _network(depth=1), _given()
    seen: list[tuple[Any, ...]] = []
    network.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    active = torch.tensor([[True, True, False]] * 2)
    network(**given, x_mask=active)
    _, t, mask, t0 = seen[0]
    size = torch.cat([network.csize_embedder(torch.tensor([[32.0, 48.0]])), network.ar_embedder(given["ar"][:1])], 1)
    assert torch.allclose(t, network.t_embedder(given["timestep"]))
    assert torch.allclose(t0, network.t_embedder(torch.zeros(2)) + size, atol=1e-6)
    assert torch.equal(mask, active)


def test_all_frames_active_equals_no_mask_and_given_frames_change_the_others() -> None:
    network, given = _network(), _given()
    plain = network(**given)
    assert torch.equal(network(**given, x_mask=torch.ones(2, 3, dtype=torch.bool)), plain)
    first_given = network(**given, x_mask=torch.tensor([[False, True, True]] * 2))
    assert not torch.allclose(first_given[:, :, 1:], plain[:, :, 1:], atol=1e-3)


def test_a_given_frame_does_not_depend_on_time_where_nothing_mixes_frames() -> None:
    network, given = _network(), _given()
    for block in network.blocks:
        block.attn_temp.proj.weight.data.zero_()
    active = torch.tensor([[False, True, True]] * 2)
    # The final layer modulates a given frame by the true time before it does so by time zero; leave that out.
    network.final_layer.forward = lambda x, *_: network.final_layer.linear(x)
    early, late = (network(**{**given, "timestep": torch.full((2,), t)}, x_mask=active) for t in (10.0, 900.0))
    assert torch.allclose(early[:, :, 0], late[:, :, 0], atol=1e-5)
    assert not torch.allclose(early[:, :, 1], late[:, :, 1], atol=1e-3)


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_of_the_clip_is_heard_and_none_may_be_missing(fact: str) -> None:
    network, given = _network(), _given()
    changed = network(**{**given, fact: given[fact] * 2})
    assert not torch.allclose(network(**given), changed, atol=1e-4)
    with pytest.raises(ClipFactsMissing, match=f"not told {fact}"):
        network(**{**given, fact: None})


def test_order_in_time_is_heard_through_rope_and_order_in_space_through_positions() -> None:
    network, given = _network(), _given()
    out = network(**given)
    flipped = network(**{**given, "x": given["x"].flip(2)}).flip(2)
    assert not torch.allclose(out, flipped, atol=1e-4)
    network.rope.freqs.zero_()
    out, flipped = network(**given), network(**{**given, "x": given["x"].flip(2)}).flip(2)
    assert torch.allclose(out, flipped, atol=1e-5)
    mirrored = network(**{**given, "x": given["x"].flip(4)}).flip(4)
    assert not torch.allclose(out, mirrored, atol=1e-4)


def test_legacy_order_of_rope_and_norm_is_the_default_and_matters() -> None:
    assert architectures.STDiT2().qk_norm_legacy
    legacy, other = _network(), STDiT2(**SMALL, qk_norm_legacy=False)
    other.load_state_dict(legacy.state_dict())
    given = _given()
    assert not torch.allclose(legacy(**given), other(**given), atol=1e-4)


@torch.no_grad()
def test_facts_of_a_batch_serve_the_doubled_batch_of_guidance() -> None:
    """The original doubles latents, times and texts and passes [B] facts, which its embedders repeat."""
    network, given = _network().eval(), {name: torch.cat([tensor, tensor[:1]]) for name, tensor in _given().items()}
    told = {name: torch.tensor([first, first + 2, 3 * first]) for name, first in FACTS.items()}
    twice = {name: given[name].repeat(2, *[1] * (given[name].ndim - 1)) for name in ("x", "timestep", "y", "mask")}
    twice["x_mask"] = torch.tensor([[True, False, True]] * 6)
    out = network(**twice, **told)
    assert torch.equal(out, network(**twice, **{name: fact.repeat(2) for name, fact in told.items()}))
    assert out.shape[0] == 6
    assert not torch.allclose(out, network(**twice, **{name: fact.flip(0) for name, fact in told.items()}), atol=1e-3)


@torch.no_grad()
def test_facts_may_follow_by_position() -> None:
    network, given = _network().eval(), _given()
    first = [given[name] for name in ("x", "timestep", "y", "mask")]
    facts = [given[name] for name in ("num_frames", "height", "width", "ar", "fps")]
    assert torch.equal(network(*first, None, *facts), network(**given))
    with pytest.raises(TypeError, match="fps by position and by name"):
        network(*first, None, *facts, fps=given["fps"])


@torch.no_grad()
def test_tokens_of_two_frames() -> None:
    network, given = _network(patch_size=(2, 2, 2)).eval(), _given((3, 4, 6))
    out = network(**given, x_mask=torch.tensor([[True, False]] * 2))
    assert out.shape == (2, 8, 3, 4, 6)
    padded = network(**{**given, "x": torch.nn.functional.pad(given["x"], (0, 0, 0, 0, 0, 1))})
    torch.testing.assert_close(padded[:, :, :3], network(**given))
    text = Text(given["y"][:, 0], torch.zeros(2, 1), given["mask"])
    inputs = Inputs(text, 32, 48, 3, torch.full((2,), 8.0), active=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(MarkedFramesError, match="joins 2 latent frames"):
        network.arguments(given["x"], given["timestep"], inputs)


def test_odd_sizes_are_padded_and_cropped() -> None:
    network, given = _network(), _given((2, 3, 5))
    out = network(**given)
    assert out.shape == (2, 8, 2, 3, 5)
    padded = network(**{**given, "x": torch.nn.functional.pad(given["x"], (0, 1, 0, 1))})
    assert torch.allclose(out, padded[..., :3, :5], atol=1e-5)


def test_fresh_network_says_zero() -> None:
    network = STDiT2(**SMALL)
    assert torch.equal(network(**_given()), torch.zeros(2, 8, 3, 4, 6))
    assert all(block.attn_temp.proj.weight.abs().max() == 0 for block in network.blocks)


def test_every_parameter_learns_and_recomputing_changes_nothing() -> None:
    network, given = _network(), _given()
    found: list[tuple[Tensor, list[Tensor]]] = []
    for blocks in (0, 1):
        network.checkpoint_blocks = (blocks, 0)
        network.zero_grad()
        out = network(**given, x_mask=torch.tensor([[True, True, False]] * 2))
        out.square().sum().backward()
        found.append((out.detach(), [parameter.grad.clone() for parameter in network.parameters()]))
    assert all(gradient.abs().max() > 0 for gradient in found[0][1])
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(first, second) for first, second in zip(found[0][1], found[1][1], strict=True))


def test_the_house_tells_it_pixels_width_over_height_and_120_fps_for_a_picture() -> None:
    network, given = _network(), _given()
    active = torch.tensor([[True, False, True]] * 2)
    text = Text(given["y"][:, 0], torch.zeros(2, 1), given["mask"])
    inputs = Inputs(text, height=32, width=48, frames=3, fps=given["fps"], active=active)
    out = denoise(network, network, given["x"], given["timestep"], inputs)
    assert torch.equal(out, network(**given, x_mask=active))
    picture = network.arguments(given["x"][:, :, :1], given["timestep"], replace(inputs, frames=1, active=None))
    assert picture["fps"].tolist() == [120.0, 120.0]
    assert picture["num_frames"].tolist() == [1.0, 1.0]
    assert picture["x_mask"] is None


def test_card_rebuilds_the_network_and_the_null_caption_stands_for_no_text() -> None:
    network = _network()
    card = network.card(Origin("v1_1-tiny", "stage1"))
    assert card.kind == "stdit2"
    STDiT2(architectures.STDiT2(**card.config)).load_state_dict(network.state_dict())
    assert network.null_context.shape == (5, 8)


def test_half_precision_by_autocast_or_by_weights_stays_close_and_answers_in_float32() -> None:
    network, given = _network(), _given()
    exact = network(**given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(**given)
    # Time 999 is 1000 in bfloat16, as in the original; a time that bfloat16 holds compares the arithmetic alone.
    given["timestep"] = torch.tensor([992.0, 31.0])
    told = network(**given)
    half = network.bfloat16()(**given)
    for close, to in ((mixed, exact), (half, told)):
        assert close.dtype == torch.float32
        assert (close - to).norm() < 0.05 * to.norm()
