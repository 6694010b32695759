"""The temporal part of OpenSora-VAE 1.2: causality, the pad in front, and a block against a closed form."""

import pytest
import torch

from ml.architectures import OpenSoraV12Net
from ml.models.autoencoders.opensora_v1_2_layers import CausalConv3d, ResBlock, TemporalAutoencoder

TINY = OpenSoraV12Net(filters=16, num_res_blocks=1, num_groups=1)


@torch.no_grad()
@pytest.mark.parametrize(("stride", "sums"), [(1, [1, 3, 6, 9, 12, 15]), (2, [3, 9, 15])])
def test_a_convolution_of_ones_sums_the_present_and_the_past(stride: int, sums: list[int]) -> None:
    """Frames 1 to 6: stride 1 has two zeros in front of them, stride 2 one."""
    convolution = CausalConv3d(1, 1, 3, stride=stride, bias=False)
    convolution.conv.weight.fill_(0.0)
    convolution.conv.weight[..., 1, 1] = 1.0
    frames = torch.arange(1.0, 7.0)[None, None, :, None, None].expand(1, 1, 6, 2, 2)
    assert convolution(frames)[0, 0, :, 0, 0].tolist() == sums


@torch.no_grad()
def test_a_block_adds_its_branch_to_its_input() -> None:
    """Branches that see the present pixel only, against the formula: norm with eps 1e-5, x sigmoid(x), shortcut."""
    torch.manual_seed(0)
    block = ResBlock(2, 4, 1).double()
    assert block.norm1.eps == block.norm2.eps == 1e-5
    for convolution in (block.conv1.conv, block.conv2.conv):
        middle = convolution.weight[..., -1, 1, 1].clone()
        convolution.weight.zero_()
        convolution.weight[..., -1, 1, 1] = middle
    x = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64)

    def mixed(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
        return torch.einsum("oi,bithw->bothw", weight, y * torch.sigmoid(y))

    branch = mixed(mixed(x, block.conv1.conv.weight[..., -1, 1, 1]), block.conv2.conv.weight[..., -1, 1, 1])
    shortcut = torch.einsum("oi,bithw->bothw", block.conv3.conv.weight[..., 0, 0, 0], x)
    torch.testing.assert_close(block(x), branch + shortcut)
    assert not hasattr(ResBlock(4, 4, 1), "conv3")


@torch.no_grad()
def test_frames_see_the_past_only() -> None:
    """Group norms are over all frames of a micro frame, so causality is that of the convolutions: without norms."""
    net = _without_norms()
    y = torch.randn(1, 4, 17, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for changed in range(1, 17):
        other = y.clone()
        other[:, :, changed:] += 1
        before, after = net.encode(y)[0], net.encode(other)[0]
        first = -(-changed // 4)  # latent i ends at frame 4i, since three zeros come first
        torch.testing.assert_close(before[:, :, :first], after[:, :, :first])
        assert not torch.allclose(before[:, :, first], after[:, :, first])
    z = before
    for changed in range(1, 5):
        other = z.clone()
        other[:, :, changed:] += 1
        before, after = net.decode(z, 17), net.decode(other, 17)
        first = 4 * changed - 3
        torch.testing.assert_close(before[:, :, :first], after[:, :, :first])
        assert not torch.allclose(before[:, :, first], after[:, :, first])


def _without_norms() -> TemporalAutoencoder:
    torch.manual_seed(0)
    net = TemporalAutoencoder(TINY).double()
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return net


@torch.no_grad()
@pytest.mark.parametrize(("frames", "zeros"), [(1, 3), (2, 2), (7, 1), (8, 0)])
def test_zeros_fill_a_clip_up_in_front_and_are_cut_off(frames: int, zeros: int) -> None:
    torch.manual_seed(0)
    net = TemporalAutoencoder(TINY)
    y = torch.randn(1, 4, frames, 2, 3)
    padded = torch.cat([torch.zeros(1, 4, zeros, 2, 3), y], dim=2)
    mean, logvar = net.encode(y)
    torch.testing.assert_close(mean, net.encode(padded)[0])
    assert mean.shape == logvar.shape == (1, 4, (frames + zeros) // 4, 2, 3)
    torch.testing.assert_close(net.decode(mean, frames), net.decode(mean, frames + zeros)[:, :, zeros:])
