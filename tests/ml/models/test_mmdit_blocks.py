"""Blocks of the MMDiT: what a fresh block does, what meets where, and in which dtype."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ml.architectures import MMDiT as Section
from ml.models.mmdit_blocks import DoubleBlock, FinalLayer, Rope, SingleBlock, StreamAttention, heads_first, heads_last
from ml.models.sequence import HERE, PlainSequence, Shared

layouts = pytest.mark.parametrize("fused", [False, True])


def _section(fused: bool, **hyper: object) -> Section:
    return Section(hidden_size=48, num_heads=2, axes_dim=(4, 10, 10), fused_qkv=fused, **hyper)


def _random(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.double()


def _tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 48, generator=generator, dtype=torch.float64) for length in lengths]


def _still(length: int) -> Rope:
    """Every token at the origin: nothing turns."""
    return Rope(torch.ones(1, 1, length, 12).double(), torch.zeros(1, 1, length, 12).double(), True)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1) @ value


@layouts
def test_silent_modulation_makes_a_block_the_identity(fused: bool) -> None:
    (img, txt), (vec,) = _tokens(5, 3), _tokens(1)
    double, single = _random(DoubleBlock(_section(fused))), _random(SingleBlock(_section(fused)))
    for modulation in (double.img_mod, double.txt_mod, single.modulation):
        for parameter in modulation.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(double(img, txt, vec[:, 0], _still(8), HERE)[0], img)
    assert torch.equal(double(img, txt, vec[:, 0], _still(8), HERE)[1], txt)
    assert torch.equal(single(img, vec[:, 0], _still(5), HERE), img)


@layouts
def test_queries_and_keys_are_normed_and_values_are_not(fused: bool) -> None:
    stream = _random(StreamAttention(_section(fused)))
    stream.norm.query_norm.scale.data.fill_(2.0)
    stream.norm.key_norm.scale.data.fill_(3.0)
    (x,) = _tokens(7)
    query, key, value = stream.project(x)
    assert query.shape == key.shape == value.shape == (2, 2, 7, 24)
    assert torch.allclose(query.square().mean(-1), torch.full((2, 2, 7), 4.0).double(), rtol=1e-3)
    assert torch.allclose(key.square().mean(-1), torch.full((2, 2, 7), 9.0).double(), rtol=1e-3)
    weight, bias = (stream.qkv.weight[96:], stream.qkv.bias[96:]) if fused else stream.v_proj.parameters()
    assert torch.allclose(heads_last(value), x @ weight.T + bias)


@layouts
def test_a_single_block_is_its_formula(fused: bool) -> None:
    """x + gate linear2([attention, gelu(mlp)]) with everything spelled out once more from the weights."""
    block = _random(SingleBlock(_section(fused)))
    (x,), (vec,) = _tokens(6), _tokens(1)
    shift, scale, gate = block.modulation(vec[:, 0])
    centred = x - x.mean(-1, keepdim=True)
    inner = centred / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    if fused:
        q, k, v, hidden = block.linear1(inner).split([48, 48, 48, 192], dim=-1)
    else:
        q, k = block.q_proj(inner), block.k_proj(inner)
        v, hidden = block.v_mlp(inner).split([48, 192], dim=-1)
    query, key = block.norm(heads_first(q, 2), heads_first(k, 2))
    heard = heads_last(_plain(query, key, heads_first(v, 2)))
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    wanted = x + gate * block.linear2(torch.cat([heard, gelu], -1))
    assert torch.allclose(block(x, vec[:, 0], _still(6), HERE), wanted, atol=1e-6)


def test_text_comes_first_where_both_streams_meet() -> None:
    block, (img, txt), (vec,) = _random(DoubleBlock(_section(False))), _tokens(5, 3), _tokens(1)
    met: list[Tensor] = []

    class Spy(PlainSequence):
        def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
            met.append(value)
            return super().attention(query, key, value, tokens)

    block(img, txt, vec[:, 0], _still(8), Shared(Spy()))
    shift, scale, *_ = block.txt_mod(vec[:, 0])
    normed = torch.nn.functional.layer_norm(txt, (48,), eps=1e-6) * (1 + scale) + shift
    assert torch.allclose(met[0][:, :, :3], heads_first(block.txt_attn.v_proj(normed), 2))


def test_autocast_reaches_attention_in_one_dtype() -> None:
    """The norms' scales stay float32, so queries and keys must be brought back to the dtype of the values."""
    dtypes: list[tuple[torch.dtype, ...]] = []

    class Spy(PlainSequence):
        def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
            dtypes.append((query.dtype, key.dtype, value.dtype))
            return super().attention(query, key, value, tokens)

    block, (x,), (vec,) = SingleBlock(_section(True)), _tokens(6), _tokens(1)
    rope = Rope(torch.ones(1, 1, 6, 12), torch.zeros(1, 1, 6, 12), True)
    with torch.autocast("cpu", torch.bfloat16):
        block(x.float(), vec[:, 0].float(), rope, Shared(Spy()))
    assert dtypes == [(torch.bfloat16,) * 3]


def test_the_bias_of_projections_is_optional_in_double_blocks_only() -> None:
    names = set(DoubleBlock(_section(False, qkv_bias=False)).state_dict())
    assert not any(name.endswith("_proj.bias") for name in names)
    assert {"img_attn.proj.bias", "txt_attn.proj.bias"} <= names
    assert "q_proj.bias" in SingleBlock(_section(False, qkv_bias=False)).state_dict()


def test_the_final_layer_modulates_before_it_projects() -> None:
    layer, (x,), (vec,) = _random(FinalLayer(48, 10)), _tokens(4), _tokens(1)
    linear = layer.adaLN_modulation[1]
    shift, scale = (torch.nn.functional.silu(vec) @ linear.weight.T + linear.bias).chunk(2, -1)
    wanted = layer.linear(torch.nn.functional.layer_norm(x, (48,), eps=1e-6) * (1 + scale) + shift)
    assert torch.allclose(layer(x, vec[:, 0]), wanted)
