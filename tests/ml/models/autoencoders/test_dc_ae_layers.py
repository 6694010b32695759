import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ml.models.autoencoders.dc_ae_layers import (
    AttentionBlock,
    Down,
    LinearAttention,
    RMSNorm3d,
    Up,
    average,
    shuffle,
    unshuffle,
)


def test_unshuffle_counts_places_in_a_block_and_shuffle_undoes_it() -> None:
    video = torch.arange(2 * 2 * 4 * 4 * 6).float().reshape(2, 2, 4, 4, 6)
    folded = unshuffle(video, (2, 2, 2))
    assert folded.shape == (2, 16, 2, 2, 3)
    # Channel 1, place (1, 0, 1) of a block: 1*8 + 1*4 + 0*2 + 1.
    assert torch.equal(folded[:, 13], video[:, 1, 1::2, 0::2, 1::2])
    assert torch.equal(shuffle(folded, (2, 2, 2)), video)
    assert torch.equal(unshuffle(video, (1, 2, 2))[:, :, 3], F.pixel_unshuffle(video[:, :, 3], 2))


def test_average_takes_neighbouring_channels() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1, 1)
    assert average(x, 3).flatten().tolist() == [0.5, 2.5, 4.5]


def test_the_norm_divides_by_the_root_mean_square_of_a_position() -> None:
    norm3d = RMSNorm3d(2)
    norm3d.weight.data, norm3d.bias.data = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    found = norm3d(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1, 1)).flatten()
    rms = math.sqrt(12.5 + 1e-5)
    assert found.tolist() == pytest.approx([3 / rms, 8 / rms + 1])


def test_linear_attention_is_the_explicit_weighted_mean() -> None:
    torch.manual_seed(0)
    attention = LinearAttention(8, 4).eval()
    x = torch.randn(2, 8, 2, 3, 2)
    qkv = attention.qkv(x)
    both = torch.cat([qkv, attention.aggreg[0](qkv)], 1).reshape(2, 4, 3, 4, 12)
    q, k, v = both[:, :, 0].relu(), both[:, :, 1].relu(), both[:, :, 2]
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k)
    mixed = torch.einsum("bhnm,bhdm->bhdn", weights / (weights.sum(-1, keepdim=True) + 1e-15), v)
    wanted = attention.proj(mixed.reshape(2, 16, 2, 3, 2))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (2, 1), (6, 3)])
def test_a_level_down_halves_a_clip_in_time_and_keeps_a_single_frame(frames: int, kept: int) -> None:
    """With the convolution silenced, the shortcut is the mean of each 2x2x2 (or 2x2) block."""
    down = Down((2, 2), (2, 2, 2))
    for parameter in down.main.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 2, frames, 4, 6)
    torch.testing.assert_close(down(x), F.avg_pool3d(x, (2 if frames > 1 else 1, 2, 2)))
    assert down(x).shape[2] == kept


@pytest.mark.parametrize("clip", [True, False])
def test_a_level_up_repeats_positions_and_a_clip_twice_in_time(clip: bool) -> None:
    """With the convolution silenced, the shortcut is the nearest neighbour; a clip of one frame becomes two."""
    up = Up((2, 2), (2, 2, 2))
    for parameter in up.main.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 2, 1, 3, 2)
    factor = (2 if clip else 1, 2, 2)
    assert torch.equal(up(x, clip), F.interpolate(x, scale_factor=factor, mode="nearest"))
    enlarged = up.main.conv
    nn.init.dirac_(enlarged.conv.weight)
    assert torch.equal(up.main(x, factor), F.interpolate(x, scale_factor=factor, mode="nearest"))


def test_branches_are_added_to_what_they_see() -> None:
    """A branch whose last norm has weight 0 and bias b adds b."""
    block = AttentionBlock(8, 4)
    x = torch.randn(1, 8, 2, 3, 2)
    for module in block.modules():
        if isinstance(module, RMSNorm3d):
            module.weight.data.zero_()
            module.bias.data.fill_(0.5)
    torch.testing.assert_close(block(x), x + 1.0)


def test_half_precision_attention_neither_overflows_nor_divides_by_zero() -> None:
    attention = LinearAttention(8, 4).eval().to(torch.bfloat16)
    nn.init.zeros_(attention.qkv.conv.weight)
    found = attention(torch.ones(1, 8, 2, 3, 2, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
