"""Ring attention against the formula: its kernels block by block, and whole rings of two and three ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ml.engines import ring
from ml.engines.ring import CpuFlash, CudaFlash, Kernel, Plain, Ring, kernel_for, merge, ring_attention

KERNELS = [CpuFlash(), Plain()]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1) @ value


def _wanted(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Attention by the formula and the gradients of query, key and value."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = _formula(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _by_blocks(kernel: Kernel, given: tuple[Tensor, ...], lengths: list[int]) -> list[Tensor]:
    """The same, with the keys cut in blocks."""
    query, key, value, grad = given
    blocks = list(zip(key.split(lengths, 2), value.split(lengths, 2), strict=True))
    out, lse = kernel.forward(query, *blocks[0])
    for block in blocks[1:]:
        out, lse = merge(out, lse, *kernel.forward(query, *block))
    whole = out.to(query.dtype), lse.contiguous()
    parts = [kernel.backward(grad, query, block, whole) for block in blocks]
    of_key, of_value = (torch.cat([part[i] for part in parts], dim=2) for i in (1, 2))
    return [out, torch.stack([part[0] for part in parts]).sum(0), of_key, of_value]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("lengths", [[9], [4, 5], [1, 7, 1]])
def test_blocks_put_together_are_attention_and_its_gradients(kernel: Kernel, lengths: list[int]) -> None:
    given = tuple(_random(2, 3, length, 8, seed=i) for i, length in enumerate((5, 9, 9, 5)))
    for found, wanted in zip(_by_blocks(kernel, given, lengths), _wanted(*given), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_plain_kernel_takes_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tuple(_random(2, 3, length, 8, seed=i) for i, length in enumerate((5, 9, 9, 5)))
    whole = _by_blocks(Plain(), given, [4, 5])
    monkeypatch.setattr(ring, "CHUNK", 2 * 3 * 5 * 2)
    for found, wanted in zip(_by_blocks(Plain(), given, [4, 5]), whole, strict=True):
        torch.testing.assert_close(found, wanted)


def test_products_far_apart_do_not_overflow() -> None:
    query, key = _random(1, 1, 4, 8, dtype=torch.float32) * 100, _random(1, 1, 6, 8, seed=1, dtype=torch.float32) * 100
    given = (query, key, _random(1, 1, 6, 8, seed=2, dtype=torch.float32), torch.ones(1, 1, 4, 8))
    for kernel in KERNELS:
        torch.testing.assert_close(_by_blocks(kernel, given, [3, 3])[0], _formula(*given[:3]), rtol=1e-4, atol=1e-5)


def test_kernel_follows_the_device() -> None:
    assert isinstance(kernel_for(torch.zeros(1)), CpuFlash)
    assert isinstance(kernel_for(torch.zeros(1, device="meta")), Plain)


def test_the_cuda_kernel_is_called_as_torch_declares_it() -> None:
    """Shapes only, on the meta device: torch itself says what the operators take and give."""
    query, grad = (torch.empty(2, 3, 5, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    block = tuple(torch.empty(2, 3, 9, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, lse = CudaFlash().forward(query, *block)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (2, 3, 5), torch.float32)
    parts = CudaFlash().backward(grad, query, (block[0], block[1]), (out.contiguous(), lse))
    assert [tuple(part.shape) for part in parts] == [(2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "CudaFlash"), (torch.float32, "Plain")])
def test_blocks_on_a_gpu_are_attention_and_its_gradients(dtype: torch.dtype, name: str) -> None:
    given = tuple(_random(2, 3, length, 64, seed=i).to("cuda", dtype) for i, length in enumerate((70, 130, 130, 70)))
    kernel = kernel_for(given[0])
    assert type(kernel).__name__ == name
    allowed = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    wanted = _wanted(*(x.double() for x in given))
    for found, exact in zip(_by_blocks(kernel, given, [64, 66]), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, **allowed)


def _pass_round(lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """This rank's output and gradients of one attention over the ring."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    query, key, value, grad = _whole(sum(lengths), dtype)
    mine = [x.split(list(lengths), 2)[rank].clone().requires_grad_() for x in (query, key, value)]
    out = ring_attention(*mine, Ring(dist.group.WORLD, lengths))
    found = [out.detach(), *torch.autograd.grad(out, mine, grad.split(list(lengths), 2)[rank])]
    dist.destroy_process_group()
    return found


def _whole(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    return [_random(2, 3, tokens, 8, seed=i).to(dtype) for i in range(4)]


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((4, 4), torch.float64),
        ((5, 4), torch.float32),
        ((3, 3, 2), torch.float64),
        ((6, 6, 6, 6), torch.bfloat16),
    ],
)
def test_a_ring_is_attention_over_all_tokens(ranks: Any, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    told = ranks(_pass_round, lengths, dtype, count=len(lengths))
    allowed = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for found, wanted in zip(zip(*told, strict=True), _wanted(*_whole(sum(lengths), dtype)), strict=True):
        torch.testing.assert_close(torch.cat(found, dim=2), wanted, **allowed)
