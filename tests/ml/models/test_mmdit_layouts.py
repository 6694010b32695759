"""Layouts of the MMDiT's weights: exact inverses, and equal outputs in every layout."""

import itertools

import pytest
import torch
from torch import Tensor

from ml.models.mmdit import MMDiT
from ml.models.mmdit_layouts import LayoutMismatch, fuse_qkv, split_qkv, to_half_split, to_interleaved

SIZES = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 48,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": (4, 10, 10),
}
LAYOUTS = list(itertools.product([False, True], [False, True]))
# Four numbers of the original network (om/mmdit, main, float64) on the weights and inputs of `_wave`, by layout
# (fused_qkv, use_liger_rope): out[0, 0, 0], out[0, 0, 1], out[1, 7, 3] and the root mean square of out.
ORIGINAL = {
    (False, False): (-1.377659, -1.034125, 0.369669, 1.264916),
    (False, True): (-1.374742, -1.033762, 0.359846, 1.262607),
    (True, False): (0.670078, -0.441108, 0.383846, 0.296594),
    (True, True): (0.674527, -0.441043, 0.380872, 0.295877),
}


def _network(fused: bool, half_split: bool, **hyper: object) -> MMDiT:
    torch.manual_seed(0)
    network = MMDiT(**{**SIZES, "fused_qkv": fused, "use_liger_rope": half_split, "cond_embed": True, **hyper})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.double()


def _tokens() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"img": (2, 7, 16), "txt": (2, 5, 20), "timesteps": (2,), "y_vec": (2, 12), "cond": (2, 7, 20)}
    tokens = {name: torch.rand(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    ids = torch.randint(0, 30, (2, 7, 3), generator=g)
    return {**tokens, "img_ids": ids, "txt_ids": torch.zeros(2, 5, 3, dtype=torch.int64)}


def _convert(state: dict[str, Tensor], fused: bool, half_split: bool) -> dict[str, Tensor]:
    state = fuse_qkv(state, 48) if fused else split_qkv(state, 48)
    return state if half_split else to_interleaved(state, 2)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _wave(shape: tuple[int, ...], order: int) -> Tensor:
    numbers = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(numbers * (0.37 + order)).reshape(shape)


@pytest.mark.parametrize(("fused", "half_split"), LAYOUTS)
def test_outputs_are_those_of_the_original(fused: bool, half_split: bool) -> None:
    network = _network(fused, half_split, guidance_embed=True)
    names = sorted(network.state_dict().items())
    network.load_state_dict({name: 0.3 * _wave(value.shape, k) for k, (name, value) in enumerate(names)})
    ids = torch.tensor([[7 * f, 7 * i, 7 * j] for f in range(2) for i in range(2) for j in range(3)])
    out = network(
        img=_wave((2, 12, 16), 0),
        img_ids=ids.expand(2, -1, -1),
        txt=_wave((2, 5, 20), 1),
        txt_ids=torch.zeros(2, 5, 3, dtype=torch.int64),
        timesteps=torch.tensor([0.25, 0.875], dtype=torch.float64),
        y_vec=_wave((2, 12), 2),
        cond=_wave((2, 12, 20), 3),
        guidance=torch.tensor([4.0, 1.0], dtype=torch.float64),
    )
    found = (*out[0, 0, :2].tolist(), out[1, 7, 3].item(), out.square().mean().sqrt().item())
    assert found == pytest.approx(ORIGINAL[fused, half_split], rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(("fused", "half_split"), LAYOUTS)
def test_converted_weights_give_the_same_output(fused: bool, half_split: bool) -> None:
    released = _network(False, True)
    other = _network(fused, half_split)
    other.load_state_dict(_convert(released.state_dict(), fused, half_split), strict=True)
    assert torch.allclose(other(**_tokens()), released(**_tokens()), atol=1e-12)


def test_lanes_matter() -> None:
    """Without the permutation the interleaved network must differ, or the test above says nothing."""
    released, other = _network(False, True), _network(False, False)
    assert not torch.allclose(other(**_tokens()), released(**_tokens()), atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_splitting_and_fusing_are_inverse(bias: bool) -> None:
    split = dict(_network(False, True, qkv_bias=bias).state_dict())
    fused = fuse_qkv(split, 48)
    assert fused.keys() == _network(True, True, qkv_bias=bias).state_dict().keys()
    assert _equal(split_qkv(fused, 48), split)
    assert _equal(fuse_qkv(split_qkv(fused, 48), 48), fused)
    assert _equal(split_qkv(split, 48), split)
    assert _equal(fuse_qkv(fused, 48), fused)


@pytest.mark.parametrize("fused", [False, True])
def test_lanes_go_there_and_back_and_commute_with_fusing(fused: bool) -> None:
    state = dict(_network(fused, False).state_dict())
    half = to_half_split(state, 2)
    assert not _equal(half, state)
    assert _equal(to_interleaved(half, 2), state)
    other, convert = (split_qkv, fuse_qkv) if fused else (fuse_qkv, split_qkv)
    assert _equal(convert(to_half_split(other(state, 48), 2), 48), half)


def test_lane_2d_goes_to_d_and_lane_2d_plus_1_to_half_plus_d() -> None:
    rows = torch.arange(48.0)[:, None].expand(48, 48)
    names = {"double_blocks.0.img_attn.q_proj.weight": rows, "single_blocks.0.norm.key_norm.scale": torch.arange(24.0)}
    untouched = {"double_blocks.0.img_attn.v_proj.weight": rows, "double_blocks.0.img_attn.proj.weight": rows}
    moved = to_half_split({**names, **untouched}, 2)
    head = [2 * d for d in range(12)] + [2 * d + 1 for d in range(12)]
    assert moved["single_blocks.0.norm.key_norm.scale"].tolist() == head
    query = moved["double_blocks.0.img_attn.q_proj.weight"][:, 0].tolist()
    assert query == head + [24 + lane for lane in head]
    assert all(moved[name] is rows for name in untouched)


def test_fused_rows_are_query_key_value_then_mlp() -> None:
    state = {f"single_blocks.0.{part}.bias": torch.full((48,), i) for i, part in enumerate(("q_proj", "k_proj"))}
    state["single_blocks.0.v_mlp.bias"] = torch.full((48 * 5,), 2)
    fused = fuse_qkv(state, 48)["single_blocks.0.linear1.bias"]
    assert fused.tolist() == [0] * 48 + [1] * 48 + [2] * 240


def test_paper_size_converts_on_the_meta_device() -> None:
    with torch.device("meta"):
        shapes = [
            {name: value.shape for name, value in MMDiT(fused_qkv=fused).state_dict().items()}
            for fused in (False, True)
        ]
        split = MMDiT(fused_qkv=False).state_dict()
    fused = to_interleaved(fuse_qkv(split, 3072), 24)
    assert {name: value.shape for name, value in fused.items()} == shapes[1]
    back = split_qkv(to_half_split(fused, 24), 3072)
    assert {name: value.shape for name, value in back.items()} == shapes[0]


def test_sizes_that_do_not_fit_are_refused() -> None:
    state = dict(_network(False, True).state_dict())
    with pytest.raises(LayoutMismatch, match="not the width 64"):
        fuse_qkv(state, 64)
    with pytest.raises(LayoutMismatch, match="do not fit a width of 40"):
        split_qkv(fuse_qkv(state, 48), 40)
    with pytest.raises(LayoutMismatch, match="7 heads"):
        to_half_split(state, 7)
    del state["double_blocks.1.img_attn.k_proj.weight"]
    with pytest.raises(LayoutMismatch, match=r"double_blocks\.1\.img_attn\.k_proj\.weight is missing"):
        fuse_qkv(state, 48)
