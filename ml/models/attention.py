"""The one door to attention: every network of the house calls it, so a faster kernel is a change of this file.

Letters: B batch, N heads, L query tokens, M key tokens, D head size. Every backend computes softmax(q k^T / sqrt(D)) v
and agrees with the plain formula up to rounding. `sdpa` (torch picks the fused kernel) is always there; the others are
FlashAttention 2, 3 and 4, which take no mask and only float16 and bfloat16.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


class AttentionInput(ValueError):  # noqa: N818  (the house names it so)
    """Shapes or lengths that do not fit together, or a mask given to a backend that takes none."""


class BackendMissing(RuntimeError):  # noqa: N818  (the house names it so)
    """An attention backend that is unknown, not installed, or not made for this device, dtype or head size."""


@dataclass(frozen=True)
class Flash:
    """A FlashAttention package: where its functions live, how to get it, and what its kernels take.

    `capabilities` are the CUDA compute capabilities (major, minor) from and below which it runs. A head is padded with
    zeros to the next of the `heads` it takes, which changes no product.
    """

    module: str
    install: str
    capabilities: tuple[tuple[int, int], tuple[int, int]]
    heads: tuple[int, ...] = tuple(range(8, 257, 8))


# flash-attention's README (2: Ampere and later; 3: Hopper) and flash_attn/cute/interface.py (4: 9.x to 11.x, heads of
# 64, 96 and 128).
FLASH = {
    "flash_attn_3": Flash(
        "flash_attn_interface", "build flash-attention's hopper/ folder (pip install ./hopper)", ((9, 0), (10, 0))
    ),
    "flash_attn_4": Flash("flash_attn.cute.interface", "pip install flash-attn-4", ((9, 0), (12, 0)), (64, 96, 128)),
    "flash_attn_2": Flash(
        "flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation", ((8, 0), (12, 1))
    ),
}
DTYPES = (torch.float16, torch.bfloat16)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention at scale 1/sqrt(D): query [B,N,L,D], key and value [B,N,M,D] -> [B,N,L,D].

    `mask` broadcasts to [B,N,L,M]: bool (True = attend) or numbers added to the products. `backend` is a name of
    `backends()`; None takes the fastest that fits (`choose`). A query whose keys are all masked out (bool) gets zeros.
    Raises BackendMissing when the named backend cannot run here, AttentionInput when it takes no mask and one is given.
    """
    name = _named(backend, query, mask is not None)
    if name == "sdpa":
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    flat = (x.transpose(1, 2) for x in (query, key, value))
    return _flash(name, "flash_attn_func", *flat).transpose(1, 2).to(query.dtype)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Attention of samples laid end to end, each within itself: query [Lq,N,D], key and value [Lk,N,D] -> [Lq,N,D].

    Sample b owns query_lengths[b] queries and key_lengths[b] keys, in order; a sample without keys gets zeros. Raises
    AttentionInput when the lengths do not add up to the tokens, and BackendMissing as `attention` does.
    """
    _check_lengths(query, key, query_lengths, key_lengths)
    name = _named(backend, query, masked=False)
    if name == "sdpa":
        return _packed_sdpa(query, key, value, list(query_lengths), list(key_lengths))
    limits = {
        "cu_seqlens_q": _bounds(query_lengths, query.device),
        "cu_seqlens_k": _bounds(key_lengths, key.device),
        "max_seqlen_q": max(query_lengths, default=0),
        "max_seqlen_k": max(key_lengths, default=0),
    }
    return _flash(name, "flash_attn_varlen_func", query, key, value, **limits).to(query.dtype)


def backends() -> tuple[str, ...]:
    """Names of the backends that are installed and run on this machine's GPU, fastest first; `sdpa` is the last."""
    if not torch.cuda.is_available():
        return ("sdpa",)
    capability = torch.cuda.get_device_capability()
    return (*(name for name in FLASH if _runs_on(name, capability) and _installed(name)), "sdpa")


def choose(device: torch.device, dtype: torch.dtype, shape: Sequence[int], masked: bool) -> str:
    """The fastest backend for queries of this shape [..., D]; FlashAttention for unmasked half precision on a GPU."""
    if device.type != "cuda" or masked or dtype not in DTYPES:
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    fits = (name for name in FLASH if shape[-1] <= FLASH[name].heads[-1] and _runs_on(name, capability))
    return next((name for name in fits if _installed(name)), "sdpa")


def _named(backend: str | None, query: Tensor, masked: bool) -> str:
    """The backend to use, having checked a name that was asked for."""
    dtype = _computed_in(query)
    if backend is None:
        return choose(query.device, dtype, query.shape, masked)
    if backend == "sdpa":
        return backend
    if backend not in FLASH:
        raise BackendMissing(f"attention backend {backend!r} is unknown; known are {', '.join(('sdpa', *FLASH))}")
    flash = FLASH[backend]
    if not _installed(backend):
        raise BackendMissing(
            f"attention backend {backend} needs the module {flash.module}: {flash.install}, or use sdpa"
        )
    if query.device.type != "cuda" or not _runs_on(backend, torch.cuda.get_device_capability(query.device)):
        low, high = (".".join(map(str, capability)) for capability in flash.capabilities)
        raise BackendMissing(f"{backend} runs on CUDA capability {low} up to {high}, not on {query.device}; use sdpa")
    if dtype not in DTYPES or query.shape[-1] > flash.heads[-1]:
        raise BackendMissing(
            f"{backend} takes float16 or bfloat16 and heads up to {flash.heads[-1]}, not {dtype} and "
            f"{query.shape[-1]}; use sdpa or autocast"
        )
    if masked:
        raise AttentionInput(f"{backend} takes no mask; use sdpa, or packed_attention for samples of several lengths")
    return backend


@cache
def _installed(name: str) -> bool:
    """Whether a backend's module is there; its parents are imported, so a broken package counts as missing."""
    try:
        return importlib.util.find_spec(FLASH[name].module) is not None
    except ImportError:
        return False


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    low, high = FLASH[name].capabilities
    return low <= capability < high


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype attention computes in: autocast's where it is on, as torch's own attention does."""
    # The meta device, on which only shapes are worked out, knows no autocast.
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _flash(name: str, function: str, query: Tensor, key: Tensor, value: Tensor, **limits: Any) -> Tensor:
    """Call a FlashAttention function on [..., N, D] tensors; some versions also return the log-sums, dropped here."""
    flash, size, dtype = FLASH[name], query.shape[-1], _computed_in(query)
    padding = next(head for head in flash.heads if head >= size) - size
    padded = [functional.pad(x, (0, padding)) if padding else x for x in (query, key, value)]
    call = getattr(importlib.import_module(flash.module), function)
    out = call(*(x.to(dtype) for x in padded), softmax_scale=1 / math.sqrt(size), **limits)
    joined: Tensor = out[0] if isinstance(out, tuple) else out
    return joined[..., :size]


def _packed_sdpa(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """One batch when all lengths are equal; else padded and masked, or one by one where padding would waste more."""
    if not queries:
        return query
    if len(set(queries)) == 1 and len(set(keys)) == 1:
        q, k, v = (x.reshape(len(queries), x.shape[0] // len(queries), *x.shape[1:]) for x in (query, key, value))
        return _heads_last(q, k, v).flatten(0, 1)
    parts = (torch.split(query, queries), torch.split(key, keys), torch.split(value, keys))
    useful = sum(q * k for q, k in zip(queries, keys, strict=True))
    if len(queries) * max(queries) * max(keys) > 2 * useful:
        return torch.cat([_heads_last(*(x[None] for x in row))[0] for row in zip(*parts, strict=True)])
    q, k, v = (pad_sequence(list(part), batch_first=True) for part in parts)
    real = torch.arange(max(keys), device=query.device) < torch.tensor(keys, device=query.device)[:, None]
    out = _heads_last(q, k, v, real[:, None, None])
    return torch.cat([row[:length] for row, length in zip(out, queries, strict=True)])


def _heads_last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Torch's attention of [B,L,N,D] instead of [B,N,L,D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where every sample starts and the last one ends, as int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _check_lengths(query: Tensor, key: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> None:
    sizes = ((query_lengths, query.shape[0], "query"), (key_lengths, key.shape[0], "key"))
    for lengths, tokens, name in sizes:
        if sum(lengths) != tokens or any(length < 0 for length in lengths):
            raise AttentionInput(f"{name} lengths {list(lengths)} do not add up to the {tokens} tokens given")
    if len(query_lengths) != len(key_lengths):
        raise AttentionInput(f"{len(query_lengths)} samples of queries but {len(key_lengths)} of keys; pass one each")
