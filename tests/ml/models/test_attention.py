"""Every attention backend against the plain softmax in float64, and samples laid end to end against samples alone."""

import math
import sys
from itertools import pairwise
from operator import sub
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ml.models import attention as door
from ml.models.attention import (
    FLASH,
    AttentionInput,
    BackendMissing,
    attention,
    backends,
    choose,
    packed_attention,
)

CPU = torch.device("cpu")


def _random(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _plain(query: Tensor, key: Tensor, value: Tensor, added: Tensor | float = 0.0) -> Tensor:
    products = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + added
    return torch.softmax(products, dim=-1) @ value


def _packed(lengths: tuple[list[int], list[int]], head: int = 8) -> list[Tensor]:
    queries, keys = (sum(side) for side in lengths)
    return _random((queries, 3, head), (keys, 3, head), (keys, 3, head))


@pytest.mark.parametrize("backend", [None, *backends()])
@pytest.mark.parametrize("head", [24, 72, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 33), (130, 130)])
def test_attention_is_the_plain_softmax(queries: int, keys: int, head: int, backend: str | None) -> None:
    if backend in FLASH:
        pytest.skip("on the CPU only sdpa runs; the GPU test covers the others")
    query, key, value = _random((2, 3, queries, head), (2, 3, keys, head), (2, 3, keys, head))
    found = attention(query, key, value, backend=backend)
    assert torch.allclose(found, _plain(query, key, value), atol=1e-12, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", *FLASH])
@pytest.mark.parametrize("head", [72, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_backend_agrees_with_the_plain_softmax_on_a_gpu(backend: str, head: int, dtype: torch.dtype) -> None:
    """Outputs and gradients, batched and packed; a backend that is not installed is skipped by name."""
    if backend not in backends():
        pytest.skip(f"{backend} is not installed or not for this GPU")
    lengths = ([100, 37, 163], [5, 300, 64])
    for shapes, call in (
        (_random(*[(2, 3, 130, head)] * 3), lambda *x: attention(*x, backend=backend)),
        (_packed(lengths, head), lambda *x: packed_attention(*x, *lengths, backend=backend)),
    ):
        rounded = [x.to("cuda", dtype) for x in shapes]
        exact = [x.double().cpu().requires_grad_() for x in rounded]
        wanted = _plain(*exact) if exact[0].ndim == 4 else packed_attention(*exact, *lengths)
        ours = [x.requires_grad_() for x in rounded]
        found = call(*ours)
        assert found.dtype == dtype
        assert (found.double().cpu() - wanted).abs().max() < (4e-3 if dtype == torch.float16 else 3e-2)
        wanted.square().sum().backward()
        found.square().sum().backward()
        for a, b in zip(ours, exact, strict=True):
            assert (a.grad.double().cpu() - b.grad).norm() < 0.03 * b.grad.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = _random(*[(2, 3, 64, 24)] * 3)
    found = attention(query.to(dtype), key.to(dtype), value.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - _plain(query, key, value)).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (2, 1, 1, 9), (5, 9), (1, 3, 5, 1)])
def test_a_bool_mask_removes_keys_and_a_number_is_added(shape: tuple[int, ...]) -> None:
    query, key, value = _random((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8))
    (numbers,) = _random(shape, seed=1)
    assert torch.allclose(attention(query, key, value, numbers), _plain(query, key, value, numbers), atol=1e-12)
    real = numbers > -0.5
    if shape[-1] == 9:
        real[..., 0] = True
        wanted = _plain(query, key, value, torch.where(real, 0.0, -torch.inf).double())
        assert torch.allclose(attention(query, key, value, real), wanted, atol=1e-12)


def test_an_added_mask_may_have_another_dtype() -> None:
    query, key, value = (x.bfloat16() for x in _random(*[(1, 2, 4, 8)] * 3))
    assert attention(query, key, value, torch.zeros(4, 4)).dtype == torch.bfloat16


def test_a_query_without_keys_gets_zeros() -> None:
    query, key, value = _random(*[(1, 2, 4, 8)] * 3)
    real = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    real[..., 2, :] = False
    out = attention(query, key, value, real)
    assert (out[:, :, 2] == 0).all()
    assert torch.allclose(out[:, :, 1], _plain(query, key, value)[:, :, 1])


def test_every_query_sees_every_key() -> None:
    """No mask: the gradient of the first output reaches the last value, as text in front must see the last frame."""
    query, key, value = (torch.ones(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    attention(query, key, value)[0, 0, 0].sum().backward()
    assert (value.grad != 0).all()


@pytest.mark.parametrize(
    "lengths",
    [
        ([4, 4, 4], [7, 7, 7]),
        ([6, 6, 6], [3, 9, 5]),
        ([2, 5, 4], [4, 4, 4]),
        ([3, 1, 60], [2, 40, 1]),
        ([3, 4], [5, 0]),
        ([30], [11]),
        ([3, 0, 2], [4, 2, 4]),
        ([3, 3], [0, 0]),
    ],
    ids=[
        "equal",
        "keys differ",
        "queries differ",
        "very unequal",
        "no keys",
        "one sample",
        "no queries",
        "no keys at all",
    ],
)
def test_packed_samples_attend_as_they_would_alone(lengths: tuple[list[int], list[int]]) -> None:
    query, key, value = _packed(lengths)
    found = packed_attention(query, key, value, *lengths)
    parts = (query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]))
    alone = [_plain(*(x.transpose(0, 1) for x in row)).transpose(0, 1) for row in zip(*parts, strict=True)]
    assert torch.allclose(found, torch.cat(alone), atol=1e-12)


def test_no_gradient_passes_from_one_packed_sample_to_another() -> None:
    lengths = ([5, 3], [4, 6])
    query, key, value = (x.requires_grad_() for x in _packed(lengths))
    packed_attention(query, key, value, *lengths)[:5].sum().backward()
    for x, own in ((query, 5), (key, 4), (value, 4)):
        assert (x.grad[:own] != 0).any()
        assert (x.grad[own:] == 0).all()


@pytest.mark.parametrize(
    ("queries", "keys", "words"),
    [([4, 4], [5, 5], "query lengths .* 9 tokens"), ([4, 5], [11, -1], "key lengths"), ([4, 5], [10], "one each")],
)
def test_lengths_that_do_not_fit_are_refused(queries: list[int], keys: list[int], words: str) -> None:
    query, key, value = _random((9, 3, 8), (10, 3, 8), (10, 3, 8))
    with pytest.raises(AttentionInput, match=words):
        packed_attention(query, key, value, queries, keys)


def test_sdpa_is_always_there_and_chosen_on_a_cpu() -> None:
    assert backends()[-1] == "sdpa"
    assert choose(CPU, torch.bfloat16, (1, 16, 64, 72), masked=False) == "sdpa"


@pytest.mark.parametrize("name", FLASH)
def test_a_backend_that_is_not_there_says_how_to_get_it(name: str) -> None:
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(BackendMissing, match=r"install|capability"):
        attention(query, query, query, backend=name)
    with pytest.raises(BackendMissing, match="'flash' is unknown; known are sdpa"):
        attention(query, query, query, backend="flash")


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((8, 0), set(FLASH), "flash_attn_2"),
        ((9, 0), set(FLASH), "flash_attn_3"),
        ((9, 0), {"flash_attn_2", "flash_attn_4"}, "flash_attn_4"),
        ((10, 0), set(FLASH), "flash_attn_4"),
        ((10, 0), {"flash_attn_3"}, "sdpa"),
        ((7, 5), set(FLASH), "sdpa"),
    ],
)
def test_the_fastest_installed_kernel_of_a_gpu_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str], chosen: str
) -> None:
    """The table alone: which GPU and which packages there are is stated, since neither is here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(door, "_installed", installed.__contains__)
    gpu, shape = torch.device("cuda", 0), (2, 16, 64, 72)
    assert choose(gpu, torch.bfloat16, shape, masked=False) == chosen
    assert choose(gpu, torch.bfloat16, shape, masked=True) == "sdpa"
    assert choose(gpu, torch.float32, shape, masked=False) == "sdpa"
    assert choose(gpu, torch.bfloat16, (2, 16, 64, 264), masked=False) == "sdpa"


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("head", [24, 72])
def test_what_a_flash_kernel_is_given_and_gives_back(monkeypatch: pytest.MonkeyPatch, name: str, head: int) -> None:
    """A kernel with FlashAttention's signature, written as the plain softmax, stands in for the GPU's."""
    sizes: set[int] = set()

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, None]:
        sizes.update((q.shape[-1], k.shape[-1], v.shape[-1]))
        products = torch.einsum("blnd,bmnd->bnlm", q, k) * softmax_scale
        return torch.einsum("bnlm,bmnd->blnd", products.softmax(-1), v), None

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **limits: Any) -> Tensor:
        starts = [limits[side].tolist() for side in ("cu_seqlens_q", "cu_seqlens_k")]
        assert [limits["max_seqlen_q"], limits["max_seqlen_k"]] == [max(map(sub, s[1:], s)) for s in starts]
        rows = [tuple(slice(*pair) for pair in pairs) for pairs in zip(*(pairwise(s) for s in starts), strict=True)]
        return torch.cat([flash_attn_func(q[None, a], k[None, b], v[None, b], softmax_scale)[0][0] for a, b in rows])

    kernel = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, FLASH[name].module, kernel)
    monkeypatch.setattr(door, "_named", lambda *_, **__: name)
    query, key, value = _random((2, 3, 5, head), (2, 3, 9, head), (2, 3, 9, head))
    assert torch.allclose(attention(query, key, value), _plain(query, key, value), atol=1e-12)
    lengths = ([3, 5, 1], [4, 2, 9])
    tokens = _packed(lengths, head)
    assert torch.allclose(packed_attention(*tokens, *lengths), door._packed_sdpa(*tokens, *lengths), atol=1e-12)
    assert sizes <= set(FLASH[name].heads)


def test_shapes_are_worked_out_on_the_meta_device() -> None:
    query = torch.zeros(2, 3, 5, 8, device="meta")
    assert attention(query, query, query).shape == (2, 3, 5, 8)
    packed = torch.zeros(5, 3, 8, device="meta")
    assert packed_attention(packed, packed, packed, [2, 3], [2, 3]).shape == (5, 3, 8)
