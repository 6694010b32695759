"""Windows: they cover the grid once, attend as full attention under a block mask, and turn by places inside them."""

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor

from ml.models.stdit_layers import Rope, RotaryTime
from ml.models.windows import WindowAttention, WindowError, Windows, grid_rope, rope_size

GRIDS = [(4, 6, 3), (5, 7, 3), (1, 1, 1), (8, 3, 5)]
WIDTH, HEADS = 24, 2


@pytest.fixture
def attention() -> WindowAttention:
    """Windows of 2 rows, 3 columns and all frames; every parameter is random, the norms' scales too."""
    torch.manual_seed(0)
    built = WindowAttention(WIDTH, HEADS, (2, 3, -1), qk_norm=True).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def _volume(grid: tuple[int, int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, *grid, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _heard(attention: WindowAttention, x: Tensor, rope: Rope | None = None, mask: Tensor | None = None) -> Tensor:
    """What the attention makes of a volume [B,H,W,T,D]."""
    _, height, width, frames, _ = x.shape
    tokens = attention(rearrange(x, "b h w t d -> b t (h w) d"), (frames, height, width), rope, mask)
    return rearrange(tokens, "b t (h w) d -> b h w t d", h=height)


def _full(attention: WindowAttention, x: Tensor, window: tuple[int, int, int], scale: float) -> Tensor:
    """Plain attention over all tokens of the grid, where a token sees those of its own window; written out by hand."""
    coordinates = torch.cartesian_prod(*(torch.arange(size) for size in x.shape[1:4])).reshape(-1, 3)
    size = torch.tensor([s if k == -1 else k for s, k in zip(x.shape[1:4], window, strict=True)])
    same = (coordinates[:, None] // size == coordinates[None] // size).all(-1)
    row, column, frame = (coordinates % size).double().unbind(-1)
    lanes = torch.repeat_interleave(10_000.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4), 2)
    angles = torch.cat([axis[:, None] * lanes for axis in (frame, row / scale, column / scale)], dim=-1)
    query, key, value = attention.qkv(x.reshape(x.shape[0], -1, WIDTH)).reshape(x.shape[0], -1, 3, HEADS, 12).unbind(2)
    turned = []
    for tensor, norm in ((query, attention.q_norm), (key, attention.k_norm)):
        normed = norm.weight * tensor / (tensor.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        partner = torch.stack([-normed[..., 1::2], normed[..., ::2]], dim=-1).flatten(-2)
        turned.append(normed * angles.cos()[:, None] + partner * angles.sin()[:, None])
    products = torch.einsum("bqnd,bknd->bnqk", *turned) / math.sqrt(12)
    weights = products.masked_fill(~same, float("-inf")).softmax(-1)
    return attention.proj(torch.einsum("bnqk,bknd->bqnd", weights, value).flatten(2)).reshape(x.shape)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [(2, 3, -1), (8, 8, -1), (-1, 2, 2), (-1, -1, -1)])
def test_split_and_join_are_inverse(grid: tuple[int, int, int], kernel_size: tuple[int, int, int]) -> None:
    windows, x = Windows.cut(grid, kernel_size), _volume(grid)
    parts = windows.split(x)
    assert parts.shape == (2 * math.prod(windows.counts), math.prod(windows.size), WIDTH)
    assert torch.equal(windows.join(parts), x)


def test_a_window_holds_neighbours_rows_first_and_frames_last() -> None:
    grid = (4, 6, 2)
    index = torch.arange(48.0).reshape(1, *grid, 1)
    second = Windows.cut(grid, (2, 3, -1)).split(index)[1, :, 0]
    expected = [row * 12 + column * 2 + frame for row in (0, 1) for column in (3, 4, 5) for frame in (0, 1)]
    assert second.tolist() == expected


def test_mask_is_minus_infinity_on_padding_and_none_where_windows_fit() -> None:
    assert Windows.cut((4, 6, 3), (2, 3, -1)).mask(torch.zeros(1)) is None
    windows = Windows.cut((3, 4, 2), (2, 3, -1))
    mask = windows.mask(torch.zeros(1))
    assert mask is not None
    assert mask.shape == (4, 1, 1, 12)
    assert sorted(mask.unique().tolist()) == [float("-inf"), 0.0]
    assert (mask == 0).flatten(1).sum(1).tolist() == [2 * 3 * 2, 2 * 1 * 2, 1 * 3 * 2, 1 * 1 * 2]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel_size", [(2, 3, -1), (8, 8, -1), (2, 2, 2)])
def test_equals_full_attention_under_a_block_mask(
    attention: WindowAttention, grid: tuple[int, int, int], kernel_size: tuple[int, int, int]
) -> None:
    attention.kernel_size = kernel_size
    x, scale = _volume(grid), 0.7
    rope = grid_rope(RotaryTime(rope_size(12)).double(), Windows.cut(grid, kernel_size).size, scale)
    torch.testing.assert_close(
        _heard(attention, x, rope), _full(attention, x, kernel_size, scale), rtol=1e-6, atol=1e-6
    )


def test_a_mask_made_once_serves_every_call(attention: WindowAttention) -> None:
    x = _volume((5, 7, 3))
    mask = Windows.cut((5, 7, 3), attention.kernel_size).mask(x)
    assert torch.equal(_heard(attention, x, None, mask), _heard(attention, x))


def test_padding_changes_nothing_for_real_tokens(attention: WindowAttention) -> None:
    """What stands in another window, padding included, is never seen: cutting it off leaves the window's result."""
    attention.kernel_size = (2, 2, -1)
    x = _volume((5, 4, 3))
    torch.testing.assert_close(_heard(attention, x)[:, :4], _heard(attention, x[:, :4]), rtol=1e-10, atol=1e-10)


def test_products_depend_on_distances_only() -> None:
    """Turning by positions leaves the product of two tokens to their distance, so a shifted window attends alike."""
    torch.manual_seed(2)
    cos, sin = (part.reshape(4, 5, 6, 1, 6) for part in grid_rope(RotaryTime(4), (4, 5, 6), scale=1.3))
    query, key = torch.randn(2, 12).unflatten(-1, (-1, 2)).unbind(0)

    def turned(vector: Tensor) -> Tensor:
        even, odd = vector.unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).squeeze(-2)

    q, k = turned(query), turned(key)
    near = (q[0, 1, 2] * k[2, 2, 3]).sum()
    torch.testing.assert_close((q[1, 3, 4] * k[3, 4, 5]).sum(), near, rtol=1e-4, atol=1e-5)
    assert abs((q[1, 3, 4] * k[2, 4, 5]).sum() - near) > 1e-3
    torch.testing.assert_close(q.norm(dim=-1), query.norm().expand(4, 5, 6), rtol=1e-5, atol=1e-5)


def test_scale_stretches_rows_and_columns_but_not_frames() -> None:
    rope = RotaryTime(24)
    plain, scaled = grid_rope(rope, (3, 4, 5), 1.0), grid_rope(rope, (3, 4, 5), 2.0)
    for one, two in zip(plain, scaled, strict=True):
        assert torch.equal(one[:, :12], two[:, :12])
        assert not torch.equal(one[:, 12:24], two[:, 12:24])
        assert not torch.equal(one[:, 24:], two[:, 24:])
    row_two = plain[0].reshape(3, 4, 5, 36)[1, 0, 0, 12:24]
    torch.testing.assert_close(scaled[0].reshape(3, 4, 5, 36)[2, 0, 0, 12:24], row_two)


def test_released_heads_have_three_parts_of_24_lanes_and_others_are_refused() -> None:
    assert rope_size(72) == 24
    with pytest.raises(WindowError, match="16 is no multiple of 6"):
        rope_size(16)
    with pytest.raises(WindowError, match="-1 for the whole axis"):
        WindowAttention(WIDTH, HEADS, (0, 8, -1))
