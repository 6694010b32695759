"""In which order ZeRO averages gradients over the ranks: the same on all of them, whatever each rank's graph is.

ColossalAI's ZeRO puts a gradient into the bucket that it averages when backward makes it, and a weight that backward
did not reach not at all. Ranks whose batches take different ways through a network (given frames on one, none on the
other) would then average unlike weights with each other, or wait for ever.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ml.engines.fsdp import leaves


class ZeroOptimizer(Protocol):
    """What is used of `colossalai.zero.LowLevelZeroOptimizer` here."""

    grad_handles: list[Any]

    def _add_to_bucket(self, param: nn.Parameter, group_id: int) -> None: ...

    def _run_reduction(self) -> None: ...


class InOrder:
    """Hands gradients to ZeRO's buckets in one order, as they come.

    A weight that another rank reached and this one did not has a gradient of zero here; one that no rank reached has
    none. The order is the reverse of the weights' at first, then that in which they came on the main rank, so that
    little waits.
    """

    def __init__(
        self,
        optimizer: ZeroOptimizer,
        weights: Sequence[nn.Parameter],
        replicas: ProcessGroup,
        collect: Callable[[Any], list[Any]],
    ) -> None:
        self.optimizer, self.replicas, self.collect = optimizer, replicas, collect
        self._weights = weights
        self._index = {id(weight): index for index, weight in enumerate(self._weights)}
        self._order: Sequence[int] = range(len(self._weights) - 1, -1, -1)
        self._waiting: deque[int] = deque()
        self._pending: set[int] = set()
        self._came: list[int] | None = []
        # Without overlap, stage 1 has no hooks: it averages after backward, in the order of the weights.
        self.early = len(optimizer.grad_handles) > 0
        for handle in optimizer.grad_handles:
            handle.remove()
        register = nn.Parameter.register_post_accumulate_grad_hook
        optimizer.grad_handles = [register(weight, self._arrived) for weight in self._weights]  # type: ignore[no-untyped-call]

    def expect(self, loss: Tensor) -> None:
        """Before the backward that ends in an average: agree which weights will have a gradient. Together."""
        coming = {self._index[leaf] for leaf in leaves(loss) if leaf in self._index}
        have = torch.tensor([i in coming or w.grad is not None for i, w in enumerate(self._weights)], dtype=torch.uint8)
        # On the host, so that nothing waits for the device.
        dist.all_reduce(have, op=dist.ReduceOp.MAX, group=self.replicas)
        expected = {index for index, found in enumerate(have.tolist()) if found}
        for index in expected - coming:
            weight = self._weights[index]
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self._pending = coming
        self._waiting = deque(index for index in self._order if index in expected) if self.early else deque()

    def finish(self) -> None:
        """After that backward. Together."""
        if self._waiting:
            # The graph promised a gradient and backward gave none: it is zero.
            for index in self._pending:
                self._weights[index].grad = torch.zeros_like(self._weights[index])
            self._pending = set()
            self._advance()
            self.optimizer._run_reduction()
        self._pending = set()
        if self._came:
            first = self.collect(self._came)[0]
            self._order, self._came = [*first, *(i for i in self._order if i not in set(first))], None

    def _arrived(self, weight: nn.Parameter) -> None:
        index = self._index[id(weight)]
        if index not in self._pending:
            return
        self._pending.discard(index)
        if self._came is not None:
            self._came.append(index)
        self._advance()

    def _advance(self) -> None:
        while self._waiting and self._waiting[0] not in self._pending:
            self.optimizer._add_to_bucket(self._weights[self._waiting.popleft()], 0)
