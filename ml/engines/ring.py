"""Ring attention: queries stay, keys and values go round a group of ranks, and the parts are merged as they come.

Letters: B batch, N heads, l tokens of this rank, m tokens of another, P ranks, D head size.

Softmax over all keys is put together from blocks by their log-sums: out = sum_i exp(lse_i - lse) out_i with lse =
logsumexp_i lse_i (arXiv 2310.01889). Backward, a block's gradients follow from the lse and the output of the whole, so
the kernels of ordinary attention serve; the gradients of keys and values travel with them and end at home.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

HALF = (torch.float16, torch.bfloat16)
# Heads of torch's FlashAttention on CUDA: multiples of 8 up to 256 (native/transformers/cuda/sdp_utils.cpp).
FLASH_UNIT, FLASH_HEAD = 8, 256
# Products of queries and keys that the plain kernel holds at a time: 64 MiB of float32.
CHUNK = 2**24


@dataclass(frozen=True)
class Ring:
    """Two ranks or more that pass things to the next one, and how many tokens each of them holds, at least one."""

    group: ProcessGroup
    lengths: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This rank of the ring."""
        return dist.get_rank(self.group)

    def owner(self, step: int) -> int:
        """Whose tokens are here after they were passed on `step` times."""
        return (self.rank - step) % len(self.lengths)

    def pass_on(self, x: Tensor, step: int) -> "Passing":
        """Start to send x [...,m,D], here after `step` passes, to the next rank, and to take the last one's."""
        size, coming = len(self.lengths), self.owner(step + 1)
        room = x.new_empty(*x.shape[:-2], self.lengths[coming], x.shape[-1])
        after, before = (dist.get_global_rank(self.group, (self.rank + turn) % size) for turn in (1, -1))
        transfers = (dist.P2POp(dist.isend, x, after, self.group), dist.P2POp(dist.irecv, room, before, self.group))
        return Passing(x, room, dist.batch_isend_irecv([*transfers]))


@dataclass(frozen=True)
class Passing:
    """A transfer under way; it holds what is sent until that has left."""

    sent: Tensor
    coming: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """What came."""
        for work in self.works:
            work.wait()
        return self.coming


class Kernel(Protocol):
    """Attention to one block of keys, forward and backward."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """query [B,N,l,D], key and value [B,N,m,D] -> out [B,N,l,D] and the log-sums of the products [B,N,l]."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, block: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the block (key, value) adds to the gradients of query, key and value.

        `grad` is that of the output; `whole` are the output and the log-sums over all blocks.
        """
        ...


def communicating(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Calls the function; a compiled block pauses there, for what speaks to other ranks is not traced."""
    apply: Callable[..., Tensor] = torch.compiler.disable(function.apply)  # type: ignore[no-untyped-call]
    return apply


def ring_attention(query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of the ring, [B,N,l,D]; exact, never causal."""
    return _ring_attention(query, key, value, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        wide, kernel = torch.promote_types(query.dtype, torch.float32), kernel_for(query)
        out = query.new_zeros(query.shape, dtype=wide)
        lse = query.new_full(query.shape[:-1], -math.inf, dtype=wide)
        block = torch.stack([key, value])
        for step, last in _turns(ring):
            passing = None if last else ring.pass_on(block, step)
            out, lse = merge(out, lse, *kernel.forward(query, block[0], block[1]))
            block = block if passing is None else passing.wait()
        narrow = out.to(query.dtype)
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, narrow, lse)
        return narrow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, lse = ctx.saved_tensors
        ring, grad, kernel = ctx.ring, grads[0].contiguous(), kernel_for(query)
        of_query = torch.zeros_like(query, dtype=lse.dtype)
        block, coming = torch.stack([key, value]), None
        for step, last in _turns(ring):
            passing = None if last else ring.pass_on(block, step)
            parts = kernel.backward(grad, query, (block[0], block[1]), (out, lse))
            of_query += parts[0]
            of_block = torch.stack(parts[1:]).to(lse.dtype)
            # What earlier ranks found for these keys and values came while this rank was computing.
            of_block = of_block if coming is None else of_block + coming.wait()
            coming = ring.pass_on(of_block, step)
            block = block if passing is None else passing.wait()
        of_key, of_value = cast(Passing, coming).wait().to(query.dtype)
        return of_query.to(query.dtype), of_key, of_value, None


_ring_attention = communicating(_RingAttention)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: [B,N,l,D] and log-sums [B,N,l] of both."""
    both = torch.logaddexp(lse, block_lse.to(lse.dtype))
    kept, added = ((part - both).exp()[..., None] for part in (lse, block_lse))
    return kept * out + added * block_out, both


def kernel_for(query: Tensor) -> Kernel:
    """The kernel for queries of this device, dtype and head size."""
    if query.device.type == "cpu":
        return CpuFlash()
    fits = query.shape[-1] % FLASH_UNIT == 0 and query.shape[-1] <= FLASH_HEAD
    return CudaFlash() if query.device.type == "cuda" and query.dtype in HALF and fits else Plain()


class CpuFlash:
    """Torch's fused attention on the CPU, which tells the log-sums; see `Kernel`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of one block."""
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False)
        return cast(tuple[Tensor, Tensor], out)

    def backward(
        self, grad: Tensor, query: Tensor, block: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block."""
        function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return cast(tuple[Tensor, Tensor, Tensor], function(grad, query, *block, *whole, 0.0, False))


class CudaFlash:
    """Torch's FlashAttention 2 on CUDA, in half precision, which tells the log-sums; see `Kernel`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of one block."""
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)
        return out[0], out[1]

    def backward(
        self, grad: Tensor, query: Tensor, block: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block; the state of a generator is asked for and, without dropout, not read."""
        lengths = (query.shape[2], block[0].shape[2])
        state = (query.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))
        function = torch.ops.aten._scaled_dot_product_flash_attention_backward
        parts = function(grad, query, *block, *whole, None, None, *lengths, 0.0, False, *state)
        return cast(tuple[Tensor, Tensor, Tensor], parts)


class Plain:
    """The formula itself, some queries at a time, in at least float32: for what no fused kernel takes; see `Kernel`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of one block."""
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        outs, sums = [], []
        for part in torch.split(query, _rows(query, key), dim=2):
            products = _products(part, key)
            sums.append(products.logsumexp(-1))
            outs.append((products - sums[-1][..., None]).exp() @ value)
        return torch.cat(outs, dim=2), torch.cat(sums, dim=2)

    def backward(
        self, grad: Tensor, query: Tensor, block: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block: with weights w and their gradients g, a product's gradient is w (g - sum of w g over keys)."""
        grad, query, key, value, out = (x.to(whole[1].dtype) for x in (grad, query, *block, whole[0]))
        of_key, of_value, of_query = torch.zeros_like(key), torch.zeros_like(value), []
        shift = (grad * out).sum(-1, keepdim=True)
        rows = _rows(query, key)
        parts = (torch.split(x, rows, dim=2) for x in (query, whole[1], grad, shift))
        for part, sums, of_out, mean in zip(*parts, strict=True):
            weights = (_products(part, key) - sums[..., None]).exp()
            of_products = weights * (of_out @ value.mT - mean) / math.sqrt(query.shape[-1])
            of_query.append(of_products @ key)
            of_key += of_products.mT @ part
            of_value += weights.mT @ of_out
        return torch.cat(of_query, dim=2), of_key, of_value


def _turns(ring: Ring) -> list[tuple[int, bool]]:
    """How often blocks have been passed on at each turn, and whether it is the last."""
    return [(step, step == len(ring.lengths) - 1) for step in range(len(ring.lengths))]


def _rows(query: Tensor, key: Tensor) -> int:
    """How many queries the plain kernel takes at a time."""
    return max(1, CHUNK // (query.shape[0] * query.shape[1] * key.shape[2]))


def _products(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT / math.sqrt(query.shape[-1])
