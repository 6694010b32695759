"""STDiT (1.0): its names and size at paper size, one block against plain einsum, and what a fresh network says."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ml import architectures
from ml.models.inputs import Inputs, Text, denoise
from ml.models.sequence import HERE
from ml.models.stdit import STDiT
from ml.models.stdit_layers import Moment, PackedText
from ml.models.weights import Origin

SMALL = {
    "input_size": (3, 4, 6),
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 8,
    "model_max_length": 5,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _network(**hyper: Any) -> STDiT:
    """A small network none of whose parameters is zero."""
    network = STDiT(**{**SMALL, **hyper})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def _given(batch: int = 2, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Tensor]:
    mask = torch.arange(5) < torch.tensor([[2], [5]])[:batch]
    text = torch.randn(batch, 1, 5, 8)
    return {"x": torch.randn(batch, 4, *size), "timestep": torch.tensor([999.0, 31.0])[:batch], "y": text, "mask": mask}


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def _normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def _heard(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L,D], [M,D], [M,D] with two heads -> [L,D]."""
    query, key, value = (part.reshape(len(part), 2, -1) for part in (query, key, value))
    scores = torch.einsum("lnd,mnd->nlm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("nlm,mnd->lnd", scores.softmax(-1), value).flatten(1)


def _self_attention(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return _linear(state, f"{name}.proj", _heard(*_linear(state, f"{name}.qkv", x).chunk(3, dim=-1)))


def _block(state: dict[str, Tensor], x: Tensor, six: Tensor, text: Tensor, temporal: Tensor) -> Tensor:
    """One sample [T,S,D] through one block, sub-layer by sub-layer."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = state["scale_shift_table"] + six.reshape(6, -1)
    inner = _normed(x) * (1 + scale) + shift
    x = x + gate * torch.stack([_self_attention(state, "attn", frame) for frame in inner])
    series = [_self_attention(state, "attn_temp", x[:, s] + temporal) for s in range(x.shape[1])]
    x = x + gate * torch.stack(series, dim=1)
    key, value = _linear(state, "cross_attn.kv_linear", text).chunk(2, dim=-1)
    query = _linear(state, "cross_attn.q_linear", x).flatten(0, 1)
    x = x + _linear(state, "cross_attn.proj", _heard(query, key, value)).reshape(x.shape)
    hidden = _linear(state, "mlp.fc1", _normed(x) * (1 + mlp_scale) + mlp_shift)
    return x + mlp_gate * _linear(state, "mlp.fc2", torch.nn.functional.gelu(hidden, approximate="tanh"))


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of STDiT-XL/2 for 16 x 256 x 256, from the patterns of the released files."""
    width = 1152

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 256, width),
        "pos_embed_temporal": (1, 16, width),
        "x_embedder.proj.weight": (width, 4, 1, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.y_embedding": (120, 4096),
        "final_layer.scale_shift_table": (2, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("t_block.1", 6 * width, width),
        **linear("y_embedder.y_proj.fc1", width, 4096),
        **linear("y_embedder.y_proj.fc2", width, width),
        **linear("final_layer.linear", 32, width),
    }
    for index in range(28):
        block = f"blocks.{index}"
        shapes[f"{block}.scale_shift_table"] = (6, width)
        for name in ("attn", "attn_temp"):
            shapes |= linear(f"{block}.{name}.qkv", 3 * width, width) | linear(f"{block}.{name}.proj", width, width)
        shapes |= linear(f"{block}.cross_attn.q_linear", width, width)
        shapes |= linear(f"{block}.cross_attn.kv_linear", 2 * width, width)
        shapes |= linear(f"{block}.cross_attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes


def test_names_and_shapes_are_the_released_ones_and_759_6_million_parameters_learn() -> None:
    with torch.device("meta"):
        network = STDiT(architectures.STDiT(input_size=(16, 32, 32)))
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == _expected_shapes()
    # Buffers (positions, null caption) are not counted; with them it is 760.4 million.
    assert sum(parameter.numel() for parameter in network.parameters()) == 759_620_768


def test_one_block_equals_plain_einsum() -> None:
    network = _network()
    block, x = network.blocks[0], torch.randn(2, 3, 6, 24)
    six, temporal = torch.randn(2, 6 * 24), torch.randn(1, 3, 24)
    texts = [torch.randn(2, 24), torch.randn(5, 24)]
    out = block(x, Moment(six), PackedText(torch.cat(texts), [2, 5]), HERE, temporal)
    for row in range(2):
        expected = _block(block.state_dict(), x[row], six[row], texts[row], temporal[0])
        assert torch.allclose(out[row], expected, rtol=1e-5, atol=1e-5)


def test_temporal_attention_hears_raw_tokens_through_the_gate_of_the_spatial_one() -> None:
    block = _network().blocks[0]
    for name, parameter in block.named_parameters():
        if not name.startswith("attn_temp") and name != "scale_shift_table":
            parameter.data.zero_()
    block.scale_shift_table.data = torch.randn(6, 24)
    x, six = 5 + 3 * torch.randn(1, 3, 1, 24), torch.zeros(1, 6 * 24)
    residual = block(x, Moment(six), PackedText(torch.zeros(1, 24), [1]), HERE, None) - x
    expected = block.scale_shift_table[2] * _self_attention(block.state_dict(), "attn_temp", x[0, :, 0])
    assert torch.allclose(residual[0, :, 0], expected, atol=1e-4)


def test_only_the_first_block_hears_the_position_in_time() -> None:
    network, given = _network(depth=1), _given()
    apart = network(**given)
    network.pos_embed_temporal.zero_()
    assert not torch.allclose(apart, network(**given), atol=1e-3)
    deeper = _network(depth=2)
    deeper.blocks[0].attn_temp.proj.weight.data.zero_()
    with_positions = deeper(**given)
    deeper.pos_embed_temporal.zero_()
    assert torch.equal(with_positions, deeper(**given))


def test_position_tables_are_indices_divided_by_the_scales() -> None:
    network = STDiT(**SMALL, space_scale=0.5, time_scale=2 / 3)
    assert network.pos_embed_temporal[0, 2, 0].item() == pytest.approx(torch.tensor(3.0).sin().item())
    token = 1 * 3 + 2
    assert network.pos_embed[0, token, 0].item() == pytest.approx(torch.tensor(4.0).sin().item())
    assert network.pos_embed[0, token, 12].item() == pytest.approx(torch.tensor(2.0).sin().item())


def test_other_sizes_get_tables_of_their_own_stretched_as_published() -> None:
    """0.5 at 256 px and 1.0 at 512 px: twice the side, twice the scale, the same range of positions."""
    made_for = _network(input_size=(2, 8, 8), space_scale=1.0)
    other = _network(input_size=(5, 4, 4), space_scale=0.5)
    other.load_state_dict(
        {name: tensor for name, tensor in made_for.state_dict().items() if not name.startswith("pos_embed")},
        strict=False,
    )
    given = _given(size=(2, 8, 8))
    assert torch.equal(made_for(**given), other(**given))


def test_odd_sizes_are_padded_and_cropped() -> None:
    network, given = _network(), _given(size=(3, 3, 5))
    out = network(**given)
    assert out.shape == (2, 8, 3, 3, 5)
    padded = network(**{**given, "x": torch.nn.functional.pad(given["x"], (0, 1, 0, 1))})
    assert torch.allclose(out, padded[..., :3, :5], atol=1e-5)


def test_fresh_network_says_zero_and_starts_as_an_image_model() -> None:
    network, given = STDiT(**SMALL), _given()
    assert torch.equal(network(**given), torch.zeros(2, 8, 3, 4, 6))
    for block in network.blocks:
        assert block.cross_attn.proj.weight.abs().max() == 0
        assert block.attn_temp.proj.weight.abs().max() == 0
    torch.nn.init.normal_(network.final_layer.linear.weight)
    image = network(**{**given, "x": given["x"][:, :, :1]})
    assert torch.allclose(network(**given)[:, :, :1], image, atol=1e-5)


def test_padding_of_the_text_is_never_heard_and_no_mask_means_all_of_it() -> None:
    network, given = _network(), _given()
    out = network(**given)
    other = {**given, "y": torch.where(given["mask"][:, None, :, None], given["y"], torch.randn(2, 1, 5, 8))}
    assert torch.equal(out, network(**other))
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(network(**{**given, "mask": everything}), network(**{**given, "mask": None}))
    assert not torch.allclose(out, network(**{**given, "mask": None}), atol=1e-3)


def test_samples_of_a_batch_do_not_hear_each_other() -> None:
    network, given = _network(), _given()
    alone = network(**{name: tensor[1:] for name, tensor in given.items()})
    assert torch.allclose(network(**given)[1:], alone, atol=1e-5)


def test_every_parameter_learns_and_recomputing_changes_nothing() -> None:
    network, given = _network(), _given()
    found: list[tuple[Tensor, list[Tensor]]] = []
    for blocks in (0, 2):
        network.checkpoint_blocks = (blocks, 0)
        network.zero_grad()
        out = network(**given)
        out.square().sum().backward()
        found.append((out.detach(), [parameter.grad.clone() for parameter in network.parameters()]))
    assert all(gradient.abs().max() > 0 for gradient in found[0][1])
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(first, second) for first, second in zip(found[0][1], found[1][1], strict=True))


def test_the_house_calls_it_through_inputs() -> None:
    network, given = _network(), _given()
    text = Text(given["y"][:, 0], torch.zeros(2, 1), given["mask"])
    inputs = Inputs(text, height=32, width=48, frames=3, fps=torch.full((2,), 8.0))
    assert torch.equal(denoise(network, network, given["x"], given["timestep"], inputs), network(**given))
    assert network.null_context is network.y_embedder.y_embedding
    card = network.card(Origin("v1_0-tiny", "stage1"))
    assert card.kind == "stdit"
    assert architectures.STDiT(**card.config) == network.config


def test_output_is_float32_and_without_variance_has_as_many_channels_as_the_latent() -> None:
    network, given = _network(pred_sigma=False), _given()
    given["timestep"] = torch.tensor([992.0, 31.0])  # bfloat16 holds these; 999 it rounds to 1000, as in the original
    exact = network(**given)
    assert exact.shape == given["x"].shape
    half = network.bfloat16()(**given)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_unknown_settings_are_refused_and_freezing_works_from_the_config() -> None:
    with pytest.raises(ValidationError, match="hiden_size"):
        STDiT(hiden_size=24)
    frozen = STDiT(**SMALL, freeze="not_temporal")
    assert {name.split(".")[2] for name, p in frozen.named_parameters() if p.requires_grad} == {"attn_temp"}
