"""Recomputation changes memory and nothing else: outputs and gradients stay bit for bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ml import architectures
from ml.models import host, recompute
from ml.models.mmdit import MMDiT
from ml.models.recompute import Recompute, keeps
from ml.models.stdit3 import STDiT3

POLICIES = [Recompute(kind, offload) for kind in ("block", "selective") for offload in (False, True)]
ALL, NONE = (100, 100), (0, 0)


def _mmdit(fused: bool) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    hyper: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "axes_dim": (4, 10, 10), "depth": 2}
    sizes = {"depth_single_blocks": 2, "in_channels": 16, "vec_in_dim": 8, "context_in_dim": 12, "fused_qkv": fused}
    network = MMDiT(architectures.MMDiT(**hyper, **sizes))
    places = {"img_ids": torch.zeros(2, 24, 3), "txt_ids": torch.zeros(2, 8, 3), "timesteps": torch.rand(2)}
    given = {"img": torch.randn(2, 24, 16), "txt": torch.randn(2, 8, 12), "y_vec": torch.randn(2, 8), **places}
    return _loud(network), given


def _stdit3() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    hyper: dict[str, Any] = {"hidden_size": 48, "num_heads": 2, "depth": 2, "caption_channels": 12, "drop_path": 0.5}
    network = STDiT3(architectures.STDiT3(**hyper, class_dropout_prob=0.0))
    size = {name: torch.full((2,), value) for name, value in (("fps", 24.0), ("height", 64.0), ("width", 64.0))}
    text = {"y": torch.randn(2, 1, 5, 12), "mask": torch.ones(2, 5, dtype=torch.long)}
    return _loud(network), {"x": torch.randn(2, 4, 3, 8, 8), "timestep": torch.tensor([100.0, 700.0]), **text, **size}


def _loud(network: nn.Module) -> nn.Module:
    """Zero weights would hide what a block does."""
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.05)
    return network.train()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "mmdit": partial(_mmdit, False),
    "mmdit_fused": partial(_mmdit, True),
    "stdit3": _stdit3,
}
networks = pytest.mark.parametrize("name", list(NETWORKS))


def _step(network: Any, given: dict[str, Any], policy: Recompute, blocks: tuple[int, int]) -> list[Tensor]:
    """Output and all gradients, random numbers (of the dropped paths) from one seed."""
    network.recompute, network.checkpoint_blocks = policy, blocks
    network.zero_grad()
    torch.manual_seed(7)
    out = network(**given)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)]


def _held(network: Any, given: dict[str, Any], policy: Recompute, blocks: tuple[int, int]) -> int:
    """Bytes that a forward pass allocates and does not free: what is kept for the backward pass."""
    network.recompute, network.checkpoint_blocks = policy, blocks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        out = network(**given)
    events = seen.profiler.kineto_results.events()
    del out
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@networks
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_are_bit_for_bit_those_of_no_recomputation(name: str, policy: Recompute) -> None:
    network, given = NETWORKS[name]()
    wanted = _step(network, given, Recompute(), NONE)
    found = _step(network, given, policy, ALL)
    assert len(wanted) == len(found) > 20
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@networks
def test_each_policy_keeps_less_than_the_one_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = NETWORKS[name]()
    kept = [_held(network, given, Recompute(), NONE)]
    kept += [_held(network, given, Recompute(kind), ALL) for kind in ("selective", "block")]
    assert kept == sorted(set(kept), reverse=True), "none > selective > block"
    assert kept[2] < kept[0] / 4
    parked: dict[int, int] = {}

    def weighed(tensor: Tensor) -> host.Parked:
        parked[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return host.park(tensor)

    monkeypatch.setattr(recompute, "park", weighed)
    _held(network, given, Recompute("block", offload=True), ALL)
    assert kept[2] > kept[2] - sum(parked.values()) >= 0, "what is parked is part of what block keeps"
    assert sum(parked.values()) > kept[2] / 4


def test_offload_parks_the_inputs_of_blocks_and_what_selective_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    monkeypatch.setattr(recompute, "park", lambda tensor: (shapes.append(tensor.shape), host.park(tensor))[1])
    network, given = NETWORKS["mmdit"]()
    _step(network, given, Recompute("block", offload=True), ALL)
    img, txt, joint, vec = (torch.Size(shape) for shape in ((2, 24, 48), (2, 8, 48), (2, 32, 48), (2, 48)))
    assert shapes == [img, txt, vec, img, txt, vec, joint, vec, joint, vec]
    _step(network, given, Recompute("selective", offload=True), ALL)
    assert len(shapes) > 60


@networks
def test_selective_repeats_no_matrix_product_and_no_attention(name: str) -> None:
    network, given = NETWORKS[name]()
    work = []
    for policy, blocks in ((Recompute(), NONE), *((policy, ALL) for policy in POLICIES)):
        with FlopCounterMode(display=False) as counter:
            _step(network, given, policy, blocks)
        work.append(counter.get_total_flops())
    plain, block, offloaded, selective, parked = work
    assert plain == selective == parked
    assert block == offloaded > 1.2 * plain


def test_attention_of_other_packages_is_kept_and_pointwise_work_is_not() -> None:
    aten = torch.ops.aten
    assert keeps(aten.addmm.default)
    assert keeps(aten._scaled_dot_product_flash_attention.default)
    assert not keeps(aten.gelu.default)
    assert not keeps(aten._softmax.default)
    torch.library.define("flash_attn_3::fwd_of_a_test", "(Tensor x) -> Tensor")
    assert keeps(torch.ops.flash_attn_3.fwd_of_a_test.default)


def test_without_gradients_nothing_is_kept_or_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "park", lambda tensor: pytest.fail("parked without a backward pass to come"))
    network, given = NETWORKS["mmdit"]()
    network.recompute, network.checkpoint_blocks = Recompute("selective", offload=True), ALL
    with torch.no_grad():
        network(**given)


def test_a_graph_that_is_kept_can_go_backward_twice() -> None:
    network, given = NETWORKS["mmdit"]()
    network.recompute, network.checkpoint_blocks = Recompute("selective", offload=True), ALL
    loss = network(**given).square().mean()
    weights = list(network.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, weights, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


@pytest.mark.gpu
def test_on_a_gpu_memory_falls_with_every_policy() -> None:
    network, given = NETWORKS["mmdit"]()
    network.cuda()
    moved = {name: value.cuda() for name, value in given.items()}
    moved["img"], moved["img_ids"] = moved["img"].repeat(1, 200, 1), moved["img_ids"].repeat(1, 200, 1)
    kept, grads = [], []
    for policy in (None, Recompute("selective"), Recompute("block"), Recompute("block", True)):
        network.recompute, network.checkpoint_blocks = policy or Recompute(), ALL if policy else NONE
        network.zero_grad()
        before = torch.cuda.memory_allocated()
        out = network(**moved)
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        out.square().mean().backward()
        grads.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert kept == sorted(set(kept), reverse=True)
    for found in grads[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(grads[0], found, strict=True))
