"""The block of STDiT-3 restated by hand, and who hears which text."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ml.architectures import STDiT3
from ml.models.stdit3_blocks import Heard, Place, STDiT3Block
from ml.models.stdit_layers import Moment, PackedText, RotaryTime
from ml.models.windows import grid_rope

WIDTH, HEADS, HEAD = 48, 4, 12
GRID = (3, 2, 5)
LENGTHS = [4, 7]


def _block(temporal: bool, drop_rate: float = 0.0, **hyper: Any) -> STDiT3Block:
    torch.manual_seed(0)
    config = STDiT3(hidden_size=WIDTH, num_heads=HEADS, **hyper)
    block = STDiT3Block(config, temporal, drop_rate).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _heard(seed: int = 4, given: tuple[int, ...] = (), null_seed: int = 5) -> Heard:
    prompt, null = (PackedText(_random(s, sum(LENGTHS), WIDTH), LENGTHS) for s in (seed, null_seed))
    return Heard(prompt, given, null if given else None)


def _place() -> Place:
    return Place(GRID, None, RotaryTime(HEAD).double()(torch.arange(GRID[0])))


def _tokens() -> Tensor:
    return _random(1, 2, GRID[0], GRID[1] * GRID[2], WIDTH)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head at a time: [L,n,d], [M,n,d] -> [L,n d]."""
    heads = [(q[:, n] @ k[:, n].T / math.sqrt(HEAD)).softmax(-1) @ v[:, n] for n in range(HEADS)]
    return torch.cat(heads, dim=-1)


def _turn(x: Tensor) -> Tensor:
    """Complex rotation of lane pairs by position x frequency: [L,n,d]."""
    frequencies = torch.tensor([10_000 ** (-2 * i / HEAD) for i in range(HEAD // 2)], dtype=torch.float64)
    angles = torch.arange(len(x))[:, None, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def _restated(state: dict[str, Tensor], frames: Tensor, text: Tensor, six: Tensor, temporal: bool) -> Tensor:
    """A block for one sample, row by row: frames [T,S,D], text [L,D], six [6,D]."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def layer_norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = state["scale_shift_table"] + six
    inner = layer_norm(frames) * (1 + scale) + shift
    attended = []
    for row in inner.transpose(0, 1) if temporal else inner:
        q, k, v = linear("attn.qkv", row).reshape(len(row), 3, HEADS, HEAD).unbind(1)
        q, k = rms_norm(q, "attn.q_norm.weight"), rms_norm(k, "attn.k_norm.weight")
        attended.append(linear("attn.proj", _attend(_turn(q), _turn(k), v) if temporal else _attend(q, k, v)))
    joined = torch.stack(attended)
    x = frames + gate * (joined.transpose(0, 1) if temporal else joined)
    key, value = linear("cross_attn.kv_linear", text).reshape(len(text), 2, HEADS, HEAD).unbind(1)
    query = linear("cross_attn.q_linear", x.flatten(0, 1)).reshape(-1, HEADS, HEAD)
    x = x + linear("cross_attn.proj", _attend(query, key, value)).reshape(x.shape)
    hidden = linear("mlp.fc1", layer_norm(x) * (1 + mlp_scale) + mlp_shift)
    hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + mlp_gate * linear("mlp.fc2", hidden)


@pytest.mark.parametrize("temporal", [False, True])
@torch.no_grad()
def test_equals_its_restatement(temporal: bool) -> None:
    block, x, now, heard = _block(temporal), _tokens(), _random(2, 2, 6 * WIDTH), _heard()
    out = block(x, Moment(now), heard, _place())
    for b, text in enumerate(heard.prompt.tokens.split(LENGTHS)):
        expected = _restated(block.state_dict(), x[b], text, now[b].reshape(6, WIDTH), temporal)
        torch.testing.assert_close(out[b], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clean_frames_are_modulated_by_time_zero() -> None:
    """Within frames, each frame is exactly what the block makes of it at its own time."""
    block, x, heard, place = _block(temporal=False), _tokens(), _heard(), _place()
    now, clean = _random(2, 2, 6 * WIDTH), _random(3, 2, 6 * WIDTH)
    active = torch.tensor([[True, False, True], [False, True, True]])
    mixed = block(x, Moment(now, clean, active), heard, place)
    torch.testing.assert_close(mixed[active], block(x, Moment(now), heard, place)[active])
    torch.testing.assert_close(mixed[~active], block(x, Moment(clean), heard, place)[~active])


@pytest.mark.parametrize("given", [(1,), (2, 0), (0, 1, 2)])
@torch.no_grad()
def test_given_frames_hear_the_null_text_and_the_others_the_prompt(given: tuple[int, ...]) -> None:
    block, x, place, moment = _block(temporal=False), _tokens(), _place(), Moment(_random(2, 2, 6 * WIDTH))
    rest = [index for index in range(GRID[0]) if index not in given]
    out = block(x, moment, _heard(given=given), place)
    torch.testing.assert_close(out[:, list(given)], block(x, moment, _heard(seed=5), place)[:, list(given)])
    torch.testing.assert_close(out[:, rest], block(x, moment, _heard(seed=4), place)[:, rest])


@torch.no_grad()
def test_windows_and_spatial_positions_turn_by_the_grid() -> None:
    """One window of the whole grid sees what a spatial block with positions sees, frame by frame, when T is 1."""
    hyper: dict[str, Any] = {"kernel_size": (-1, -1, -1), "use_spatial_rope": True}
    spatial, windowed = _block(temporal=False, **hyper), _block(temporal=True, **hyper)
    windowed.load_state_dict(spatial.state_dict(), strict=True)
    rope = grid_rope(RotaryTime(HEAD // 3).double(), (2, 5, 1), scale=0.9)
    x, moment, place = _tokens()[:, :1], Moment(_random(2, 2, 6 * WIDTH)), Place((1, 2, 5), rope, rope)
    out = spatial(x, moment, _heard(), place)
    torch.testing.assert_close(windowed(x, moment, _heard(), place), out)
    assert not torch.allclose(spatial(x, moment, _heard(), place._replace(spatial=None)), out, atol=1e-3)


@torch.no_grad()
def test_drop_path_leaves_residuals_out_in_training_only() -> None:
    block, x, place, moment = (
        _block(temporal=True, drop_rate=0.999999),
        _tokens(),
        _place(),
        Moment(_random(2, 2, 6 * WIDTH)),
    )
    torch.testing.assert_close(block(x, moment, _heard(), place), _block(temporal=True)(x, moment, _heard(), place))
    torch.manual_seed(0)
    dropped = block.train()(x, moment, _heard(), place)
    torch.testing.assert_close(dropped, x + block.cross_attn(x, _heard().prompt))
