"""The tutorial's network is the house's network: same names, same velocity, same step."""

import torch

from benchmarks.plain_mmdit import PlainMMDiT
from benchmarks.real_step import stir
from ml.architectures import MMDiT as Section
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT

SECTION = Section(
    in_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 10, 10),
    cond_embed=True,
    fused_qkv=False,
    use_liger_rope=True,
)


def test_both_networks_say_and_learn_the_same() -> None:
    torch.manual_seed(0)
    ours = MMDiT(SECTION)
    stir(ours)
    theirs = PlainMMDiT(SECTION)
    theirs.load_state_dict(ours.state_dict())
    latents, t = torch.randn(2, 4, 3, 4, 6), torch.tensor([0.2, 0.9])
    text = Text(torch.randn(2, 5, 12), torch.randn(2, 8), torch.ones(2, 5, dtype=torch.bool))
    wanted = denoise(ours, ours, latents, t, Inputs(text, 32, 48, 9, torch.full((2,), 24.0)))
    found = theirs(latents, t, text.context, text.pooled)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted.square().mean().backward()
    found.square().mean().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6)
