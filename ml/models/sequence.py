"""The seam where a parallel engine cuts the token axis of a network over its ranks.

Letters: B batch, N heads, L tokens of all ranks, l tokens of this rank, P ranks, D head size. Where several streams are
joined (text and picture), each is cut by itself and a rank joins its shares, so the order of tokens over all ranks is
not that of one process; attention does not depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ml.models.attention import attention


class SequenceParallel(Protocol):
    """What a network asks of whoever cuts its token axis; one forward serves all engines.

    Every rank of a cut is given the same inputs and makes the same output. `tokens` are the lengths over all ranks of
    the streams that are joined on the token axis: from them every rank knows how many tokens each other rank holds.
    """

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the token axis `dim` of one stream."""
        ...

    def gather(self, x: Tensor, dim: int, tokens: int) -> Tensor:
        """All ranks' shares of the token axis `dim` of one stream, joined: the inverse of `split`."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,l,D]."""
        ...

    def to_heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Some tokens of all heads for all tokens of some heads: [B,N,l,D] -> [B,N/P,L,D]."""
        ...

    def to_tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """[B,N/P,L,D] -> [B,N,l,D]: the inverse of `to_heads`."""
        ...


class PlainSequence:
    """The default: one rank holds every token."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor, dim: int, tokens: int) -> Tensor:
        """Nothing to join."""
        return x

    def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
        """Attention on this device."""
        return attention(query, key, value)

    def to_heads(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """All heads and all tokens are here."""
        return x

    def to_tokens(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """All heads and all tokens are here."""
        return x


@dataclass(frozen=True)
class Shared:
    """Tokens that the ranks share: who cuts them, and how long each joined stream is over all ranks."""

    sp: SequenceParallel
    tokens: tuple[int, ...] = ()

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,l,D]."""
        return self.sp.attention(query, key, value, self.tokens)

    def to_heads(self, x: Tensor) -> Tensor:
        """[B,N,l,D] -> [B,N/P,L,D]."""
        return self.sp.to_heads(x, self.tokens)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B,N/P,L,D] -> [B,N,l,D]."""
        return self.sp.to_tokens(x, self.tokens)


# All tokens are on this rank: what attention over an axis that is not cut is given.
HERE = Shared(PlainSequence())
