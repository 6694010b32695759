"""Sequence parallelism: the tokens of a network cut over a group of ranks, by Ulysses or by a ring.

Letters: B batch, N heads, L tokens of all ranks, l tokens of this rank, P ranks, D head size.

Both cut tokens alike and differ in attention: Ulysses (arXiv 2309.14509) exchanges "some tokens of all heads" for "all
tokens of some heads", so P must divide N; the ring (arXiv 2310.01889) passes keys and values round, for any N. Shares
differ by one token where P does not divide a stream, so nothing is padded and no kernel needs a mask.

Gradients are averaged over the ranks of the group (and of others) after the backward pass, and every rank computes the
same loss. `gather` therefore hands back P times this rank's part of the gradient, and `split` the mean of what all
ranks ask for: a weight used before the cut, within it, or for the vectors that modulate it, ends with the gradient of
one process.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup

from ml.engines.protocol import EngineError
from ml.engines.ring import Ring, communicating, ring_attention
from ml.models.attention import attention
from ml.models.sequence import SequenceParallel

Mode = Literal["ulysses", "ring"]


def sequence_parallel(mode: Mode, group: ProcessGroup) -> SequenceParallel:
    """What cuts the tokens of a network over `group`: put it into `network.sp`; together, in all ranks of the group."""
    return {"ulysses": UlyssesSequence, "ring": RingSequence}[mode](group)


def shares(tokens: int, ranks: int) -> list[int]:
    """How many tokens of a stream each rank holds: neighbours, and one more for the first ones where it is uneven.

    Raises EngineError when there are fewer tokens than ranks.
    """
    if tokens < ranks:
        raise EngineError(
            f"{tokens} token(s) of a text or of a frame cannot be shared by {ranks} ranks: lower sequence_parallel, or "
            "leave out the smallest buckets"
        )
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


class UlyssesSequence:
    """Attention of all tokens with some of the heads: every exchange moves l N D numbers, whatever P is.

    Raises EngineError in the first forward of a network whose heads P does not divide.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the token axis `dim` of one stream."""
        return _split(x, dim, self.group)

    def gather(self, x: Tensor, dim: int, tokens: int) -> Tensor:
        """All ranks' shares of the token axis `dim` of one stream, joined: the inverse of `split`."""
        return _gather(x, dim, tokens, self.group)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,l,D]."""
        query, key, value = self.to_heads(torch.cat([query, key, value]), tokens).chunk(3)
        return self.to_tokens(attention(query, key, value), tokens)

    def to_heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Some tokens of all heads for all tokens of some heads: [B,N,l,D] -> [B,N/P,L,D].

        Raises EngineError when P does not divide N.
        """
        if x.shape[1] % self.size:
            raise EngineError(
                f"network has {x.shape[1]} heads, sequence_parallel is {self.size}: heads are dealt out whole, so set "
                "sequence_parallel to a divisor of the heads, or, where no windows are attended, sequence_mode to ring"
            )
        return _to_heads(x, self._lengths(tokens), self.group)

    def to_tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """[B,N/P,L,D] -> [B,N,l,D]: the inverse of `to_heads`."""
        return _to_tokens(x, self._lengths(tokens), self.group)

    def _lengths(self, tokens: Sequence[int]) -> list[int]:
        """How many tokens of all streams together each rank holds."""
        return [sum(of_rank) for of_rank in zip(*(shares(stream, self.size) for stream in tokens), strict=True)]


class RingSequence(UlyssesSequence):
    """Attention of this rank's tokens with all heads, while keys and values come by; windows are Ulysses' all the same.

    For networks whose heads P does not divide: an attention moves 2 L N D numbers, P/2 times what Ulysses' four
    exchanges do, though behind the products.
    """

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,l,D]."""
        return ring_attention(query, key, value, Ring(self.group, tuple(self._lengths(tokens))))


class _Split(torch.autograd.Function):
    """Cut forward; backward, the mean over ranks of the joined gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.tokens, ctx.group = dim, x.shape[dim], group
        return _cut(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        whole = _joined(grads[0], ctx.dim, ctx.tokens, ctx.group)
        return whole / dist.get_world_size(ctx.group), None, None


class _Gather(torch.autograd.Function):
    """Join forward; backward, this rank's share of the gradient, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, tokens: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _joined(x, dim, tokens, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _cut(grads[0], ctx.dim, ctx.group) * dist.get_world_size(ctx.group), None, None, None


class _ToHeads(torch.autograd.Function):
    """Tokens for heads; backward, heads for tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        return _heads_of_tokens(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _tokens_of_heads(grads[0], ctx.lengths, ctx.group), None, None


class _ToTokens(torch.autograd.Function):
    """Heads for tokens; backward, tokens for heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        return _tokens_of_heads(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _heads_of_tokens(grads[0], ctx.lengths, ctx.group), None, None


_split, _gather = communicating(_Split), communicating(_Gather)
_to_heads, _to_tokens = communicating(_ToHeads), communicating(_ToTokens)


def _cut(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """A copy of this rank's share, so that the whole can be freed."""
    parts, rank = shares(x.shape[dim], dist.get_world_size(group)), dist.get_rank(group)
    return x.narrow(dim, sum(parts[:rank]), parts[rank]).clone(memory_format=torch.contiguous_format)


def _joined(x: Tensor, dim: int, tokens: int, group: ProcessGroup) -> Tensor:
    """Shares of all ranks; they travel padded to the longest, which every collective backend can."""
    parts = shares(tokens, dist.get_world_size(group))
    mine = x.movedim(dim, 0)
    padded = torch.cat([mine, mine.new_zeros(parts[0] - len(mine), *mine.shape[1:])]).contiguous()
    whole = padded.new_empty(len(parts) * parts[0], *padded.shape[1:])
    dist.all_gather_single(whole, padded, group=group)
    real = [share[:length] for share, length in zip(torch.split(whole, parts[0]), parts, strict=True)]
    return torch.cat(real).movedim(0, dim).contiguous()


def _heads_of_tokens(x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """[B,N,l,D] -> [B,N/P,L,D] without autograd."""
    ranks, (batch, heads, _, size) = len(lengths), x.shape
    sent = rearrange(x, "b (p n) l d -> p (b n l d)", p=ranks).contiguous()
    sizes = [batch * heads // ranks * length * size for length in lengths]
    came = x.new_empty(sum(sizes))
    dist.all_to_all_single(came, sent.flatten(), sizes, [sent.shape[1]] * ranks, group=group)
    parts = zip(torch.split(came, sizes), lengths, strict=True)
    return torch.cat([part.reshape(batch, heads // ranks, length, size) for part, length in parts], dim=2)


def _tokens_of_heads(x: Tensor, lengths: list[int], group: ProcessGroup) -> Tensor:
    """[B,N/P,L,D] -> [B,N,l,D] without autograd."""
    ranks, (batch, heads, _, size), mine = len(lengths), x.shape, lengths[dist.get_rank(group)]
    sent = torch.cat([part.flatten() for part in torch.split(x, lengths, dim=2)])
    sizes = [batch * heads * length * size for length in lengths]
    came = x.new_empty(ranks * batch * heads * mine * size)
    dist.all_to_all_single(came, sent, [len(came) // ranks] * ranks, sizes, group=group)
    return rearrange(came, "(p b n l d) -> b (p n) l d", p=ranks, b=batch, n=heads, d=size, l=mine)
