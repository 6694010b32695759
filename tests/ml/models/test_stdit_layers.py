"""The shared parts of the STDiT family, against closed forms and plain einsum."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ml.models.recompute import Recompute
from ml.models.rope import rotate_pairs
from ml.models.sequence import PlainSequence, Shared
from ml.models.stdit_layers import (
    Attention,
    CaptionEmbedder,
    Mlp,
    Moment,
    MultiHeadCrossAttention,
    PatchEmbed3D,
    PositionEmbedding2D,
    RotaryTime,
    SizeEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    WeightedRMSNorm,
    drop_path,
    freeze_parameters,
    initialise,
    pack_text,
    pad_to_patches,
    plane,
    sincos,
    token_grid,
    unpatchify,
    vectors,
)

PATCH = (1, 2, 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L,N,D] each -> [L,N,D], in plain einsum."""
    scores = torch.einsum("lnd,mnd->nlm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("nlm,mnd->lnd", scores.softmax(-1), value)


def test_patches_are_dot_products_in_row_order_and_edges_are_padded_with_zeros_at_the_end() -> None:
    embed, x = PatchEmbed3D(PATCH, 3, 8), torch.randn(2, 3, 2, 3, 5)
    tokens = embed(x)
    assert tokens.shape == (2, 2, 6, 8)
    weight, bias = embed.proj.weight[:, :, 0], embed.proj.bias
    inner = torch.einsum("bcij,dcij->bd", x[:, :, 1, 0:2, 2:4], weight) + bias
    assert torch.allclose(tokens[:, 1, 1], inner, atol=1e-5)
    corner = torch.einsum("bc,dc->bd", x[:, :, 0, 2, 4], weight[:, :, 0, 0]) + bias
    assert torch.allclose(tokens[:, 0, 5], corner, atol=1e-5)


def test_padding_reaches_the_time_axis_too_and_full_patches_stay_as_they_are() -> None:
    padded = pad_to_patches(torch.ones(1, 1, 3, 5, 4), (2, 2, 2))
    assert padded.shape == (1, 1, 4, 6, 4)
    assert padded.sum() == 3 * 5 * 4
    assert padded[0, 0, :3, :5].min() == 1
    x = torch.ones(1, 1, 2, 4, 4)
    assert pad_to_patches(x, PATCH) is x
    assert token_grid(torch.Size((1, 1, 3, 5, 4)), (2, 2, 2)) == (2, 3, 2)


def test_unpatchify_reads_patch_rows_then_columns_then_channels_and_crops_the_padding() -> None:
    shape = torch.Size((1, 4, 2, 3, 3))
    tokens = torch.randn(1, 2, 4, 2 * 2 * 5)
    x = unpatchify(tokens, shape, PATCH, 5)
    assert x.shape == (1, 5, 2, 3, 3)
    for channel, frame, row, column in ((0, 0, 0, 0), (3, 1, 1, 2), (4, 0, 2, 1), (2, 1, 2, 2)):
        token = (row // 2) * 2 + column // 2
        lane = ((row % 2) * 2 + column % 2) * 5 + channel
        assert x[0, channel, frame, row, column] == tokens[0, frame, token, lane]


def test_time_is_embedded_in_the_networks_own_unit_cosines_first() -> None:
    embedder = TimestepEmbedder(12)
    angles = 250.0 * 10_000.0 ** -(torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()])
    first, last = embedder.mlp[0], embedder.mlp[2]
    hidden = first.weight @ features + first.bias
    expected = last.weight @ (hidden * torch.sigmoid(hidden)) + last.bias
    assert torch.allclose(embedder(torch.tensor([250.0]))[0], expected, atol=1e-5)


def test_sizes_are_embedded_alone_and_joined_in_order() -> None:
    embedder = SizeEmbedder(6)
    both = embedder(torch.tensor([[144.0, 256.0], [7.0, 9.0]]))
    assert both.shape == (2, 12)
    assert torch.allclose(both[0, :6], embedder(torch.tensor([144.0]))[0], atol=1e-6)
    assert torch.allclose(both[1, 6:], embedder(torch.tensor([9.0]))[0], atol=1e-6)


def test_mlp_uses_the_tanh_form_of_gelu() -> None:
    mlp, x = Mlp(4, 6, 3), torch.randn(5, 4)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert torch.allclose(mlp(x), gelu @ mlp.fc2.weight.T + mlp.fc2.bias, atol=1e-6)


def test_forced_captions_give_way_to_the_null_caption_and_training_alone_drops_nothing() -> None:
    embedder, caption = CaptionEmbedder(4, 6, 3, class_dropout_prob=1.0).train(), torch.randn(2, 1, 3, 4)
    plain = embedder(caption)
    assert torch.equal(plain, embedder.y_proj(caption))
    dropped = embedder(caption, force_drop_ids=torch.tensor([0, 1]))
    assert torch.allclose(dropped[0], plain[0], atol=1e-6)
    assert torch.allclose(dropped[1, 0], embedder.y_proj(embedder.y_embedding), atol=1e-6)


def test_random_drop_follows_its_probability_in_training_only() -> None:
    embedder, caption = CaptionEmbedder(2, 2, 1, class_dropout_prob=0.25), torch.randn(4000, 1, 1, 2)
    embedder.random_drop = True
    kept = embedder.y_proj(caption)
    dropped = (embedder.train()(caption) - kept).abs().sum((1, 2, 3)) > 1e-4
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(embedder.eval()(caption), kept)


def test_null_caption_is_a_buffer_of_variance_one_over_channels() -> None:
    embedder = CaptionEmbedder(256, 4, 100)
    assert "y_embedding" in embedder.state_dict()
    assert not [name for name, _ in embedder.named_parameters() if "embedding" in name]
    assert embedder.y_embedding.std().item() == pytest.approx(1 / 16, rel=0.03)


def test_rms_norm_has_unit_mean_square_times_its_weight() -> None:
    norm = WeightedRMSNorm(24).double()
    norm.weight.data.fill_(3.0)
    assert torch.allclose(norm(7 * torch.randn(5, 24).double()).square().mean(-1), torch.full((5,), 9.0).double())


def test_rotary_frequencies_are_kept_and_turn_neighbouring_lanes() -> None:
    rope = RotaryTime(8)
    assert list(rope.state_dict()) == ["freqs"]
    assert rope.freqs.tolist() == pytest.approx([10_000.0 ** -(2 * i / 8) for i in range(4)])
    x = torch.zeros(1, 8)
    x[0, 2] = 1.0
    turned = rotate_pairs(x, *rope(torch.tensor([3.0])))[0]
    assert turned[2].item() == pytest.approx(math.cos(3 * 0.1))
    assert turned[3].item() == pytest.approx(math.sin(3 * 0.1))
    assert turned.count_nonzero() == 2


def test_rotary_products_depend_on_the_difference_of_positions_only() -> None:
    rope = RotaryTime(12).double()
    query, key = torch.randn(2, 1, 12).double()

    def product(at: float, other: float) -> Tensor:
        here, there = rope(torch.tensor([at]).double()), rope(torch.tensor([other]).double())
        return (rotate_pairs(query, *here) * rotate_pairs(key, *there)).sum()

    assert torch.allclose(product(5.0, 2.0), product(25.0, 22.0), atol=1e-12)
    assert not torch.allclose(product(5.0, 2.0), product(5.0, 3.0), atol=1e-3)


def test_self_attention_equals_plain_einsum() -> None:
    layer, x = Attention(24, 3, qk_norm=True), torch.randn(2, 5, 24)
    for norm in (layer.q_norm, layer.k_norm):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    cos, sin = RotaryTime(8)(torch.arange(5))
    out = layer(x, (cos, sin))
    for row in range(2):
        qkv = (x[row] @ layer.qkv.weight.T + layer.qkv.bias).reshape(5, 3, 3, 8)
        turned = []
        for part, norm in ((qkv[:, 0], layer.q_norm), (qkv[:, 1], layer.k_norm)):
            normed = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            turned.append(rotate_pairs(normed.transpose(0, 1), cos, sin).transpose(0, 1))
        joined = _softmax_attention(*turned, qkv[:, 2]).reshape(5, 24)
        assert torch.allclose(out[row], joined @ layer.proj.weight.T + layer.proj.bias, atol=1e-5)


def test_order_of_rope_and_norm_matters_only_through_the_norms_scale() -> None:
    first, after = Attention(24, 3, qk_norm=True, rope_first=True), Attention(24, 3, qk_norm=True)
    after.load_state_dict(first.state_dict())
    x, rope = torch.randn(1, 4, 24), RotaryTime(8)(torch.arange(4))
    assert torch.allclose(first(x, rope), after(x, rope), atol=1e-6)
    for layer in (first, after):
        layer.q_norm.weight.data = torch.linspace(0.2, 3.0, 8)
    assert not torch.allclose(first(x, rope), after(x, rope), atol=1e-4)


def test_tokens_of_other_ranks_are_heard_through_the_seam() -> None:
    layer, x = Attention(8, 2), torch.randn(1, 5, 8)
    first, second = x.split([3, 2], dim=1)

    class Other(PlainSequence):
        def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
            assert tokens == (5,)
            _, theirs, said = layer.qkv(second).reshape(1, 2, 3, 2, 4).permute(2, 0, 3, 1, 4)
            return super().attention(query, torch.cat([key, theirs], 2), torch.cat([value, said], 2), tokens)

    heard = layer(first, None, Shared(Other(), (5,)))
    assert torch.allclose(heard, layer(x)[:, :3], atol=1e-6)


def test_packed_text_equals_padded_text_with_a_mask() -> None:
    layer, x, caption = MultiHeadCrossAttention(12, 2), torch.randn(3, 2, 4, 12), torch.randn(3, 1, 5, 12)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    out = layer(x, pack_text(caption, mask))
    assert out.shape == x.shape
    query = (x.reshape(3, 8, 12) @ layer.q_linear.weight.T + layer.q_linear.bias).reshape(3, 8, 2, 6)
    key, value = (caption[:, 0] @ layer.kv_linear.weight.T + layer.kv_linear.bias).reshape(3, 5, 2, 2, 6).unbind(2)
    scores = torch.einsum("blnd,bmnd->bnlm", query, key) / 6**0.5
    scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
    joined = torch.einsum("bnlm,bmnd->blnd", scores.softmax(-1), value).reshape(3, 8, 12)
    expected = (joined @ layer.proj.weight.T + layer.proj.bias).reshape(x.shape)
    assert torch.allclose(out, expected, atol=1e-5)


def test_text_is_packed_in_order_and_a_short_mask_is_repeated_for_guidance() -> None:
    caption = torch.arange(8.0).reshape(4, 1, 2, 1)
    packed = pack_text(caption, torch.tensor([[True, False], [True, True]]))
    assert packed.tokens.flatten().tolist() == [0, 2, 3, 4, 6, 7]
    assert packed.lengths == [1, 2, 1, 2]
    assert pack_text(caption, None).lengths == [2, 2, 2, 2]
    assert pack_text(caption, None).tokens.flatten().tolist() == list(range(8))


def test_vectors_are_table_plus_time_and_given_frames_take_those_of_time_zero() -> None:
    table, now, clean = torch.randn(3, 4), torch.randn(2, 12), torch.randn(2, 12)
    assert [tuple(v.shape) for v in vectors(table, Moment(now))] == [(2, 1, 1, 4)] * 3
    chosen = vectors(table, Moment(now, clean, torch.tensor([[True, False], [False, True]])))[1]
    assert chosen.shape == (2, 2, 1, 4)
    assert torch.allclose(chosen[0, 0, 0], table[1] + now[0, 4:8])
    assert torch.allclose(chosen[0, 1, 0], table[1] + clean[0, 4:8])
    assert torch.allclose(chosen[1, 1, 0], table[1] + now[1, 4:8])


def test_final_layer_norms_and_modulates_a_given_frame_twice() -> None:
    layer, x = T2IFinalLayer(8, 4, 3), torch.randn(2, 2, 5, 8)
    t, t0, active = torch.randn(2, 8), torch.randn(2, 8), torch.tensor([[True, False], [False, False]])
    out = layer(x, t, active, t0)
    assert out.shape == (2, 2, 5, 12)

    def once(frame: Tensor, vector: Tensor) -> Tensor:
        normed = (frame - frame.mean(-1, keepdim=True)) / (frame.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + layer.scale_shift_table[1] + vector) + layer.scale_shift_table[0] + vector

    for row in range(2):
        for frame in range(2):
            inner = once(x[row, frame], t[row])
            inner = inner if active[row, frame] else once(inner, t0[row])
            expected = inner @ layer.linear.weight.T + layer.linear.bias
            assert torch.allclose(out[row, frame], expected, atol=1e-5)
    assert torch.equal(layer(x, t, torch.ones(2, 2, dtype=torch.bool), t0), layer(x, t))


def test_positions_hold_sines_then_cosines_of_column_then_row() -> None:
    table = plane(torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([0.0, 10.0]).double(), 8)
    assert table.shape == (6, 8)
    row, column = 2.0, 10.0
    expected = [f(at * 10_000.0 ** -(i / 2)) for at in (column, row) for f in (math.sin, math.cos) for i in range(2)]
    assert table[5].tolist() == pytest.approx(expected)
    assert sincos(torch.tensor([0.0]), 4)[0].tolist() == [0, 0, 1, 1]


def test_positions_of_a_frame_are_scaled_by_area_and_stretched_to_a_square() -> None:
    table = PositionEmbedding2D(8)(torch.zeros(1).double(), height=2, width=8, scale=0.5, base_size=4)
    assert table.shape == (1, 16, 8)
    assert table.dtype == torch.float64
    column, row = 3 / 0.5 * 4 / 8, 1 / 0.5 * 4 / 2
    assert table[0, 8 + 3, 0].item() == pytest.approx(math.sin(column), abs=1e-6)
    assert table[0, 8 + 3, 6].item() == pytest.approx(math.cos(row), abs=1e-6)
    assert not PositionEmbedding2D(8).state_dict()


def test_drop_path_leaves_samples_out_in_training_and_keeps_the_mean() -> None:
    x = torch.ones(2000, 2)
    assert drop_path(x, 0.3, training=False) is x
    dropped = drop_path(x, 0.3, training=True)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_recomputing_a_block_changes_neither_output_nor_gradient() -> None:
    block, x = nn.Sequential(nn.Linear(3, 3), nn.GELU()), torch.randn(4, 3)
    gradients = []
    for recompute in (False, True):
        block.zero_grad()
        Recompute().run(block, recompute, x).sum().backward()
        gradients.append(block[0].weight.grad.clone())
    assert torch.equal(*gradients)


def test_initialisation_knows_gaussian_and_silent_layers() -> None:
    network = nn.ModuleDict({"a": nn.Linear(200, 100), "b": nn.Linear(200, 100), "c": nn.Linear(200, 100)})
    network["patch"] = PatchEmbed3D(PATCH, 4, 64)
    initialise(network, gaussian=[network["b"]], silent=[network["c"]])
    assert network["a"].weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.03)
    assert network["a"].bias.abs().max() == 0
    assert network["b"].weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert network["c"].weight.abs().max() == 0
    assert network["patch"].proj.weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 16)), rel=0.1)


def test_freezing_names_what_still_learns() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("attn_temp", "cross_attn", "mlp")})

    def learns(freeze: str | None) -> set[str]:
        network.requires_grad_(True)
        freeze_parameters(network, freeze)
        return {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}

    assert learns(None) == {"attn_temp", "cross_attn", "mlp"}
    assert learns("not_temporal") == {"attn_temp"}
    assert learns("text") == {"attn_temp", "mlp"}
