"""The closed forms against the networks themselves, built on the meta device: every parameter, every product."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ml import architectures as a
from ml.counts import block_flops, block_parameters, forward_flops, parameters, recomputed_fraction, token_grid
from ml.models.inputs import Inputs, Text
from ml.models.networks import build_network, num_parameters
from ml.recipe import Recipe, available

SPLIT = a.MMDiT(cond_embed=True, fused_qkv=False, use_liger_rope=True)
WINDOWED = a.STDiT3(in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)
RELEASED = {
    "v1_0": (a.STDiT(input_size=(16, 32, 32)), 759.6e6),
    "v1_1": (a.STDiT2(input_sq_size=512, qk_norm=True, model_max_length=200), 767.5e6),
    "v1_2": (a.STDiT3(), 1207.6e6),
    "v1_2 3B": (a.STDiT3(hidden_size=1872, num_heads=26), 3182e6),
    "v1_3": (WINDOWED, 1208.0e6),
    "v2_0": (SPLIT, 11.89e9),
    "v2_0 DC-AE": (SPLIT.model_copy(update={"in_channels": 128, "patch_size": 1}), 11.89e9),
    "flux": (a.MMDiT(fused_qkv=True, guidance_embed=True, cond_embed=False, use_liger_rope=False), 11.90e9),
}
ODD = {
    "stdit2 without norms": a.STDiT2(hidden_size=96, num_heads=4, depth=2, qk_norm=False, pred_sigma=False),
    "stdit3 images": a.STDiT3(hidden_size=96, num_heads=4, depth=2, skip_temporal=True, mlp_ratio=3.0),
    "stdit3 images of 1.3": a.STDiT3(hidden_size=96, num_heads=4, depth=2, skip_temporal=True, cond_embed=True),
    "stdit2 two frames": a.STDiT2(hidden_size=96, num_heads=4, depth=2, patch_size=(2, 2, 2)),
    "mmdit double only": a.MMDiT(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=0, cond_embed=True),
    "stdit wide patches": a.STDiT(hidden_size=96, num_heads=4, depth=2, patch_size=(1, 2, 4)),
    "mmdit without bias": a.MMDiT(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, qkv_bias=False),
}
# Latent grids of 16 frames of 256 px, and of 720p 16:9 at the frames that each generation samples; 90 rows leave a
# window of 8 half empty, 45 columns of tokens do not fill a patch.
SMALL, LARGE = (16, 32, 32), (30, 90, 160)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch knows no autocast of the meta device and refuses the question."""
    monkeypatch.setattr("ml.models.attention._computed_in", lambda x: x.dtype)


@cache
def built(config: a.Model) -> nn.Module:
    with torch.device("meta"):
        return build_network(config)


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_networks(name: str) -> None:
    config, published = RELEASED[name]
    assert parameters(config) == num_parameters(built(config))
    assert parameters(config) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("name", ODD)
def test_parameters_follow_the_switches(name: str) -> None:
    assert parameters(ODD[name]) == num_parameters(built(ODD[name]))


@pytest.mark.parametrize("name", sorted(available()))
@pytest.mark.parametrize("profile", ["tiny", "paper"])
def test_parameters_of_every_recipe(name: str, profile: str) -> None:
    network = Recipe.load(name, profile).network
    assert parameters(network) == num_parameters(built(network))


@pytest.mark.parametrize("grid", [(1, 8, 8), SMALL, LARGE], ids=str)
@pytest.mark.parametrize("name", RELEASED)
def test_work_is_what_torch_counts(name: str, grid: tuple[int, int, int]) -> None:
    """Every product of the forward pass, at sizes where embeddings matter and where attention is all.

    Two blocks of each kind are enough: the next are like them.
    """
    few = {"depth": 2, **({"depth_single_blocks": 2} if name.startswith(("v2", "flux")) else {})}
    config = RELEASED[name][0].model_copy(update=few)
    assert forward_flops(config, grid, 40) == counted(config, grid, 40)


@pytest.mark.parametrize("grid", [(3, 7, 5), (17, 30, 22)], ids=str)
def test_grids_that_neither_patch_nor_window_divides(grid: tuple[int, int, int]) -> None:
    for config in (a.STDiT3(depth=2), WINDOWED.model_copy(update={"depth": 2, "kernel_size": (4, 8, 2)})):
        assert forward_flops(config, grid, 7) == counted(config, grid, 7)


@pytest.mark.parametrize(
    ("frames", "height", "width", "tera"),
    [(1, 32, 32, 10.3), (9, 32, 32, 41.9), (33, 32, 32, 171.9), (9, 96, 96, 590), (33, 96, 96, 5092)],
)
def test_work_is_that_of_the_original(frames: int, height: int, width: int, tera: float) -> None:
    """The right-hand sides were counted on Open-Sora 2.0's own modules."""
    assert forward_flops(a.MMDiT(), (frames, height, width), 512) / 1e12 == pytest.approx(tera, rel=0.01)


def test_blocks_are_the_formulas_of_the_docstring() -> None:
    """What a further block adds, without its modulation: 24 h^2 n + 4 h n^2, and (36 or 56) h^2 N + attention."""
    h, frames, side, text = 1152, 4, 8, 12
    spatial = (side // 2) ** 2
    tokens, grid = frames * spatial, (frames, side, side)
    once = 4 * h * tokens * (spatial + frames + text) + 4 * h**2 * text
    assert added(a.STDiT(depth=1), grid, text) == 36 * h**2 * tokens + once
    assert added(a.STDiT2(depth=1), grid, text) == 36 * h**2 * tokens + once
    twice = 4 * h * tokens * (spatial + frames + 2 * text) + 8 * h**2 * text
    assert added(a.STDiT3(depth=1), grid, text) == 56 * h**2 * tokens + twice
    joint = tokens + text
    wide = a.MMDiT(depth=1)
    modulation = 24 * wide.hidden_size**2
    assert added(wide, grid, text) == 24 * wide.hidden_size**2 * joint + 4 * wide.hidden_size * joint**2 + modulation


def test_blocks_are_nearly_all_of_the_work() -> None:
    for name in ("v1_0", "v1_2", "v1_3", "v2_0"):
        config = RELEASED[name][0]
        share = block_flops(config, LARGE, 300) / forward_flops(config, LARGE, 300)
        assert 0.99 < share < 1


def test_windows_cost_their_padding_and_save_the_rest() -> None:
    """An 8 x 8 window on a frame of 4 x 4 tokens computes four times the tokens; on a large one it is a bargain."""
    plain, windowed = a.STDiT3(depth=2), a.STDiT3(depth=2, kernel_size=(8, 8, -1))
    whole = a.STDiT3(depth=2, kernel_size=(-1, -1, -1))
    small = [forward_flops(network, (4, 8, 8), 1) for network in (plain, whole, windowed)]
    assert small == sorted(small)
    assert small[0] < small[2]
    assert forward_flops(windowed, (16, 128, 128), 1) < 0.5 * forward_flops(whole, (16, 128, 128), 1)


def test_tokens_fill_up_the_last_row() -> None:
    assert token_grid(a.STDiT3(), (15, 45, 80)) == (15, 23, 40)
    assert token_grid(a.MMDiT(patch_size=1, in_channels=128), (32, 18, 32)) == (32, 18, 32)


def test_recomputation_counts_the_blocks_that_there_are() -> None:
    assert recomputed_fraction(a.MMDiT(), (8, 100)) == pytest.approx(46 / 57)
    assert recomputed_fraction(a.MMDiT(), (100, 100)) == 1
    assert recomputed_fraction(a.STDiT3(), (14, 0)) == 0.5
    assert recomputed_fraction(a.STDiT(), (100, 100)) == 1
    assert recomputed_fraction(a.STDiT2(), (0, 100)) == 0


def test_counting_loads_no_torch() -> None:
    code = "import sys, ml.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def added(model: a.Model, grid: tuple[int, int, int], text: int) -> int:
    """Work of one more block."""
    deeper = model.model_copy(update={"depth": 2})
    return forward_flops(deeper, grid, text) - forward_flops(model, grid, text)


def counted(config: a.Model, grid: tuple[int, int, int], num_text: int) -> int:
    """FLOPs of the network's own forward on the meta device."""
    network = built(config)
    mmdit = isinstance(config, a.MMDiT)
    channels = config.in_channels // config.patch_size**2 if mmdit else config.in_channels
    context = torch.zeros(1, num_text, config.context_in_dim if mmdit else config.caption_channels, device="meta")
    text = Text(context, torch.zeros(1, config.vec_in_dim if mmdit else 1, device="meta"), torch.ones(1, num_text))
    inputs = Inputs(text, 8 * grid[1], 8 * grid[2], grid[0], torch.full((1,), 24.0, device="meta"), guidance=4.0)
    x, t = torch.zeros(1, channels, *grid, device="meta"), torch.zeros(1, device="meta")
    call = network.arguments(x, t, inputs)
    # Sizes are read as numbers, and which tokens are real decides shapes: neither is there on the meta device.
    call |= {name: torch.full((1,), 512.0) for name in ("height", "width") if name in call}
    call |= {"mask": None} if "mask" in call else {}
    hooks = [m.register_forward_pre_hook(_to_meta) for n, m in network.named_modules() if n == "csize_embedder"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**call)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops()


def _to_meta(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(arg.to("meta") for arg in args)


@pytest.mark.parametrize("name", RELEASED)
def test_blocks_hold_what_is_not_at_the_ends(name: str) -> None:
    config, _ = RELEASED[name]
    network = built(config)
    kinds = ("double_blocks", "single_blocks") if isinstance(config, a.MMDiT) else ("blocks",)
    if isinstance(config, a.STDiT3):
        pair = sum(num_parameters(network.get_submodule(f"{kind}_blocks.0")) for kind in ("spatial", "temporal"))
        assert block_parameters(config) == (pair,)
    else:
        assert block_parameters(config) == tuple(num_parameters(network.get_submodule(f"{k}.0")) for k in kinds)
