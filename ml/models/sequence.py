"""The seam where a parallel engine cuts the token axis of a network over its ranks."""

from typing import Protocol

from torch import Tensor

from ml.models.attention import attention


class SequenceParallel(Protocol):
    """What a network asks of whoever cuts its token axis; one forward serves all engines."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the token axis `dim`."""
        ...

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' shares of the token axis `dim`, joined."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,L,D]."""
        ...


class PlainSequence:
    """The default: one rank holds every token."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Nothing to join."""
        return x

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention on this device."""
        return attention(query, key, value)
