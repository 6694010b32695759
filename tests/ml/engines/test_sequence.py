"""Sequence parallelism against one process: pieces, every transformer of the house, and whole trainings."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ml.engines.protocol import EngineError
from ml.engines.sequence import Mode, sequence_parallel, shares
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT
from ml.models.recompute import Recompute
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3

MODES: tuple[Mode, ...] = ("ulysses", "ring")
TEXT, CONTEXT, POOLED = 5, 8, 12
MMDIT = {"vec_in_dim": POOLED, "context_in_dim": CONTEXT, "axes_dim": (4, 4, 4), "depth_single_blocks": 1}
STDIT = {"caption_channels": CONTEXT, "model_max_length": TEXT, "qk_norm": True}
WINDOWS = {**STDIT, "kernel_size": (2, 2, -1), "use_spatial_rope": True}
SMALL = {"hidden_size": 48, "num_heads": 4, "depth": 1}
# 3 frames of 5 x 3 tokens and 5 tokens of text: two ranks share none of them evenly.
NETWORKS: dict[str, Callable[..., Any]] = {
    "mmdit": partial(MMDiT, in_channels=16, cond_embed=True, guidance_embed=True, **MMDIT),
    "mmdit-fused": partial(MMDiT, in_channels=16, fused_qkv=True, **MMDIT),
    "stdit": partial(STDiT, input_size=(3, 10, 6), caption_channels=CONTEXT, model_max_length=TEXT),
    "stdit2": partial(STDiT2, **STDIT),
    "stdit3": partial(STDiT3, force_pad_h_for_sp_size=2, **STDIT),
    "windows": partial(STDiT3, **WINDOWS),
}
Found = tuple[Tensor, dict[str, Tensor]]


def build(name: str, **over: Any) -> Any:
    """A network in float64 whose every weight says something."""
    torch.manual_seed(0)
    network = NETWORKS[name](**{**SMALL, **over}).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def call(network: Any, name: str) -> Tensor:
    """What it makes of a latent of 3 frames; where the generation knows of it, frames are given."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, network.config.in_channels // (4 if "mmdit" in name else 1), 3, 10, 6, generator=generator)
    text = Text(
        torch.randn(2, TEXT, CONTEXT, generator=generator),
        torch.randn(2, POOLED, generator=generator),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    ).to("cpu", torch.float64)
    inputs = Inputs(text, 80, 48, 3, torch.tensor([12.0, 24.0]), guidance=4.0)
    if name in ("stdit2", "stdit3"):
        inputs = replace(inputs, active=torch.tensor([[True, False, True], [True, True, True]]))
    if name in ("mmdit", "windows"):
        given = torch.randn(2, x.shape[1] + 1, 3, 10, 6, generator=generator).double()
        inputs = replace(inputs, condition=given, given=(1,))
    times = torch.tensor([0.3, 0.8]).double() * (1 if "mmdit" in name else 1000)
    return denoise(network, network, x.double(), times, inputs)


def learn(network: Any, name: str) -> Found:
    """The output, and the gradient of every weight as an engine would have it: averaged over the ranks."""
    out = call(network, name)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    for gradient in gradients.values() if dist.is_initialized() else ():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return out.detach(), gradients


def in_ranks(mode: Mode, task: Callable[[Any], Any], *given: Any) -> Any:
    """Run `task(sp, ...)` in a rank; an EngineError is handed back as its text."""
    dist.init_process_group("gloo")
    try:
        return task(sequence_parallel(mode, dist.group.WORLD), *given)
    except EngineError as error:
        return str(error)
    finally:
        dist.destroy_process_group()


def agree(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        worst = float((found[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3))
        assert worst < 1e-5, f"{name}: relative error {worst}"


def test_shares_are_even_to_one_token() -> None:
    assert [shares(7, 3), shares(6, 3), shares(3, 3)] == [[3, 2, 2], [2, 2, 2], [1, 1, 1]]
    with pytest.raises(EngineError, match=r"2 token.* shared by 3 ranks"):
        shares(2, 3)


def _pieces(sp: Any) -> list[Any]:
    x = torch.arange(2 * 4 * 7 * 3, dtype=torch.float64).reshape(2, 4, 7, 3).requires_grad_()
    mine = sp.split(x, 2)
    whole, heads = sp.gather(mine, 2, 7), sp.to_heads(mine, (7,))
    back = sp.to_tokens(heads, (7,))
    same = (torch.equal(whole, x), torch.equal(back, mine), torch.equal(heads, x[:, 2 * sp.rank : 2 * sp.rank + 2]))
    gradients = [torch.autograd.grad(y.sum() * (sp.rank + 1), x, retain_graph=True)[0] for y in (mine, whole, back)]
    return [same, *gradients]


@pytest.mark.parametrize("mode", MODES)
def test_pieces_are_inverse_and_scale_gradients(ranks: Any, mode: Mode) -> None:
    """Rank r asks for a gradient of r + 1 of its tokens: `split` means over ranks, `gather` multiplies by them."""
    for rank, (same, of_split, of_whole, of_back) in enumerate(ranks(in_ranks, mode, _pieces)):
        assert all(same), (rank, same)
        owned = torch.tensor([1.0] * 4 + [2.0] * 3, dtype=torch.float64)[:, None].expand(2, 4, 7, 3)
        torch.testing.assert_close(of_split, owned / 2)
        torch.testing.assert_close(of_whole, owned)
        # Heads 0 and 1 were asked of by rank 0 after both exchanges too, for they bring tokens home.
        torch.testing.assert_close(of_back, owned / 2)


def _all_networks(sp: Any, names: list[str]) -> dict[str, Found]:
    found = {}
    for name in names:
        network = build(name)
        network.sp = sp
        found[name] = learn(network, name)
    return found


@pytest.mark.parametrize(("mode", "count"), [("ulysses", 2), ("ring", 2), ("ulysses", 4), ("ring", 4)])
def test_every_network_says_and_learns_what_one_process_does(ranks: Any, mode: Mode, count: int) -> None:
    names = [*NETWORKS]
    wanted = {name: learn(build(name), name) for name in names}
    for told in ranks(in_ranks, mode, _all_networks, names, count=count):
        for name in names:
            agree(told[name], wanted[name])


def _three_heads(sp: Any, name: str) -> Tensor:
    network = build(name, num_heads=3, **({"axes_dim": (4, 6, 6)} if name == "mmdit" else {"hidden_size": 36}))
    network.sp = sp
    with torch.no_grad():
        return call(network, name)


@pytest.mark.parametrize(("mode", "name"), [("ulysses", "mmdit"), ("ulysses", "stdit3"), ("ring", "windows")])
def test_heads_that_do_not_divide_are_refused(ranks: Any, mode: Mode, name: str) -> None:
    for told in ranks(in_ranks, mode, _three_heads, name):
        assert "network has 3 heads, sequence_parallel is 2" in told


def test_a_ring_takes_any_number_of_heads(ranks: Any) -> None:
    """And samples: no gradient is asked for."""
    network = build("mmdit", num_heads=3, axes_dim=(4, 6, 6))
    with torch.no_grad():
        wanted = call(network, "mmdit")
    for told in ranks(in_ranks, "ring", _three_heads, "mmdit"):
        torch.testing.assert_close(told, wanted, rtol=1e-6, atol=1e-6)


def _saving(sp: Any, cases: list[tuple[str, Any, bool]], compiled: bool) -> list[Found]:
    found = []
    for name, kind, offload in cases:
        network = build(name)
        network.sp, network.checkpoint_blocks = sp, (1, 1)
        network.recompute = Recompute(kind, offload, compiled)
        for module in network.modules() if compiled else ():
            if type(module).__name__.endswith("Block"):
                module.compile(backend="aot_eager")
        found.append(learn(network, name))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_blocks_exchange_again(ranks: Any, mode: Mode) -> None:
    kinds = (("block", False), ("selective", False), ("selective", True))
    cases = [(name, *kind) for name in ("mmdit", "windows") for kind in kinds]
    for told in ranks(in_ranks, mode, _saving, cases, False):
        for (name, *_), found in zip(cases, told, strict=True):
            agree(found, learn(build(name), name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_blocks_compile_around_the_exchanges(ranks: Any, mode: Mode) -> None:
    cases = [("mmdit", "block", False), ("mmdit", "selective", False), ("stdit3", "block", False)]
    for told in ranks(in_ranks, mode, _saving, cases, True):
        for (name, *_), found in zip(cases, told, strict=True):
            agree(found, learn(build(name), name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", ["mmdit", "stdit3"])
def test_twenty_steps_are_those_of_one_process(curves: Callable[..., Any], network: str, mode: Mode) -> None:
    section = {"accumulate": 4, "sequence_parallel": 2, "sequence_mode": mode}
    curves(network, section, 2).agrees(curves(network, {}))


@pytest.mark.parametrize(("mode", "sharding"), [("ulysses", "none"), ("ring", "none"), ("ulysses", "full")])
def test_data_and_sequence_ranks_together(curves: Callable[..., Any], mode: Mode, sharding: str) -> None:
    section = {"accumulate": 2, "sequence_parallel": 2, "sequence_mode": mode, "sharding": sharding}
    curves("mmdit", section, 4, few=True).agrees(curves("mmdit", {}, few=True))
