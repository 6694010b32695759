"""Data parallel with sharded weights, gradients and optimizer state: torch's FSDP2 over the replicas.

Every block gathers its weights when it runs. The masters are this rank's fp32 shards, cut along the first axis; where
that is shorter than the ranks, or does not divide, the last ranks hold less or nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ml.engines.blocks import blocks_of
from ml.engines.plain import PlainEngine, trained


class FsdpEngine(PlainEngine):
    """FSDP2 in fp32, or with bf16 computation over fp32 shards. Needs several replicas."""

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch sums gradients over the replicas; before it they are kept whole, in fp32."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward, and the averaged shards of the gradients to the masters once the micro-batches are through."""
        self._touched(loss).backward()  # type: ignore[no-untyped-call]
        for name, weight in self._weights.items():
            if weight.grad is not None:
                self._add(self._masters[name], None, cast(DTensor, weight.grad).to_local())
                weight.grad = None

    def _placed(self, model: nn.Module) -> nn.Module:
        assert self.world.replicas is not None
        mesh = DeviceMesh.from_group(self.world.replicas, self.device.type)
        low = None if self.dtype == torch.float32 else self.dtype
        # Networks cast their inputs themselves: times stay fp32.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for buffer in model.buffers():
            buffer.data = buffer.to(self.device, self.dtype if buffer.is_floating_point() else None)
        self._mesh, self._weights = mesh, trained(model)
        in_blocks = {id(weight) for block in blocks_of(model) for weight in block.parameters()}
        self._rest = [name for name, weight in self._weights.items() if id(weight) not in in_blocks]
        # They share their memory with FSDP's own shards.
        self._masters = {name: nn.Parameter(_local(weight)) for name, weight in self._weights.items()}
        return model

    def _touched(self, loss: Tensor) -> Tensor:
        """The loss, in which weights have a part of zero that have a real one in another replica's.

        FSDP sums the gradients of all weights outside blocks at once, those that exist: replicas must agree which
        these are, and a network that is told of given frames in some batches only (1.3) does not.
        """
        reached = leaves(loss)
        weights = [self.model.get_parameter(name) for name in self._rest]
        here = torch.tensor([id(weight) in reached for weight in weights], dtype=torch.int32)
        anywhere = here.clone()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.world.replicas)
        for weight, lacking in zip(weights, (anywhere > here).tolist(), strict=True):
            if lacking:
                loss = loss + 0.0 * weight.sum()
        return loss

    def _norm(self) -> Tensor:
        return self._root(self._gradients(), sharded=True)

    def _joined(self, name: str, shard: Tensor) -> Tensor:
        weight = cast(DTensor, self._weights[name])
        whole = DTensor.from_local(
            shard, self._mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        return super()._joined(name, whole.full_tensor())

    def _cut(self, name: str, full: Tensor) -> Tensor:
        part = super()._cut(name, full)
        rank, ranks = self._mesh.get_local_rank(), self._mesh.size()
        each = -(-len(part) // ranks)
        start = min(rank * each, len(part))
        return part[start : start + each]

    def _publish(self) -> None:
        """FSDP rounds the shards whenever it gathers them; outside blocks it keeps what a forward gathered."""
        cast(FSDPModule, self.model).reshard()


def leaves(loss: Tensor) -> set[int]:
    """Ids of the weights that a loss depends on."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(cast(Any, node).variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _local(weight: Tensor) -> Tensor:
    return cast(DTensor, weight.detach()).to_local()
