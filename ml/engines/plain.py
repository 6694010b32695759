"""The plain engine: one device, or data x sequence x tensor ranks. The embedded default, and every engine's reference.

Replicas (data x sequence ranks) average gradients by torch's DDP; `ml.engines.blocks.parallel` cuts the network over
sequence and tensor ranks first.

In bf16 the model's weights are bf16 and the masters fp32, as ZeRO does it: gradients are added up in fp32, the update
is made on the masters, and the weights are their rounded copy.
"""

import gc
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ml.engines.blocks import Prepare, whole
from ml.engines.protocol import Cut, EngineError, MakeOptimizer, MakeScheduler, Moments, Tensors
from ml.engines.tensor import shard_
from ml.engines.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = World()


class PlainEngine:
    """fp32, or bf16 with fp32 masters. See `ml.engines.protocol.Engine` for what each method does.

    `prepare` is what `setup` does to the network first (`ml.engines.blocks.parallel`): it says which weights it cut.
    """

    model: nn.Module

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        grad_clip: float,
        world: World = ALONE,
        prepare: Prepare = whole,
    ) -> None:
        self.device, self.dtype, self.grad_clip, self.world, self.prepare = device, dtype, grad_clip, world, prepare
        self.rank, self.size = world.rank, world.size
        self.data_rank, self.data_size = world.data_rank, world.data_size
        self._weights: dict[str, nn.Parameter] = {}
        self._masters: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._cuts: Mapping[str, Cut] = {}
        self._averaged: Tensors = {}
        self._optimizer: Optimizer
        self._scheduler: LRScheduler

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Take the model to the device and dtype, wrap it, and make optimizer and schedule over its masters."""
        self._shapes = {name: tuple(weight.shape) for name, weight in trained(model).items()}
        self._cuts = self.prepare(model)
        self.model = self._placed(model)
        self._optimizer = optimizer(self._masters.values())
        self._scheduler = scheduler(self._optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch averages gradients over the replicas."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to the masters', in fp32."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.dtype == torch.float32:
            return
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            self._add(self._masters[name], self._averaged.get(name), weight.grad)
            weight.grad = None
        self._averaged.clear()

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients; returns the gradient norm before clipping."""
        total = self._norm()
        norm = float(total)
        if not math.isfinite(norm):
            self.discard()
            return norm
        clip_grads_with_norm_(self._masters.values(), self.grad_clip, total)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._publish()
        return norm

    def discard(self) -> None:
        """Drop the gradients; the schedule advances."""
        self._optimizer.zero_grad(set_to_none=True)
        self._advance()

    def learning_rate(self) -> float:
        """The rate that the next step uses."""
        return float(self._scheduler.get_last_lr()[0])

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        return self.world.total(values)

    def collect(self, value: Any) -> list[Any]:
        """What every rank gave."""
        return self.world.collect(value)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all ranks into each tensor."""
        self.world.average(tensors)

    def masters(self) -> Tensors:
        """The live fp32 weights by name."""
        return {name: master.detach() for name, master in self._masters.items()}

    def moments(self) -> Moments:
        """AdamW's live state; nothing of an optimizer that keeps no such means."""
        state = self._optimizer.state
        kept = {name: state[p] for name, p in self._masters.items() if p in state and "exp_avg" in state[p]}
        # Counts lie on the GPU where the optimizer is fused: one copy for all of them.
        counts = torch.stack([s["step"] for s in kept.values()]).tolist() if kept else []
        return Moments(
            {name: s["exp_avg"] for name, s in kept.items()},
            {name: s["exp_avg_sq"] for name, s in kept.items()},
            {name: int(count) for name, count in zip(kept, counts, strict=True)},
        )

    @torch.no_grad()
    def gather(self, shards: Mapping[str, Tensor], spread: bool = False) -> Tensors:
        """Copies on the CPU, of all names on the main rank or of some on every rank."""
        sizes = {name: math.prod(self._shapes[name]) for name in shards}
        keepers = share_out(sizes, self.size if spread else 1)
        kept: Tensors = {}
        for name, shard in shards.items():
            full = self._joined(name, shard.detach())
            if keepers[name] == self.rank:
                kept[name] = full.to("cpu", copy=True)
        return kept

    def scatter(self, full: Mapping[str, Tensor]) -> Tensors:
        """Copies on the device, of one tensor after the other."""
        return {name: self._cut(name, full[name]).to(self.device, copy=True) for name in full}

    @torch.no_grad()
    def restore(self, masters: Mapping[str, Tensor], moments: Moments, steps: int) -> None:
        """Take back weights, AdamW's state and the schedule, whose rate must depend on the step alone (LambdaLR)."""
        self._check(masters)
        for name, master in self._masters.items():
            full = masters[name]
            if tuple(full.shape) != self._shapes[name]:
                raise EngineError(_differs(name, tuple(full.shape), self._shapes[name]))
            master.copy_(self._cut(name, full))
        self._publish()
        self._restore_moments(moments)
        self._scheduler.last_epoch = steps - 1
        self._advance()

    def publish(self) -> None:
        """Let the model compute with the masters as they are now."""
        self._publish()

    def cut(self, network: nn.Module) -> None:
        """Cut a frozen network over the tensor ranks."""
        if self.world.tensor is not None:
            shard_(network, self.world.tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.world.barrier()

    def close(self) -> None:
        """Leave the process group.

        DDP goes first: whoever lets go of a group last waits for its threads, and DDP's reducer would do so holding
        the interpreter, which these threads may be waiting for.
        """
        if self._weights and isinstance(self.model, DistributedDataParallel):
            self.model = self.model.module
            gc.collect()
        self.world.close()

    def _placed(self, model: nn.Module) -> nn.Module:
        """The model on its device in its dtype, wrapped; fills `_weights` and `_masters`."""
        model.to(self.device)
        if self.dtype == torch.float32:
            self._weights = self._masters = trained(model)
        else:
            self._masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained(model).items()}
            self._weights = trained(model.to(self.dtype))
        if self.world.replicas is None:
            return model
        with warnings.catch_warnings():
            # Its successor is not in every torch that serves, and would still send the buffers once.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped = DistributedDataParallel(
                model, process_group=self.world.replicas, broadcast_buffers=False, find_unused_parameters=True
            )
        if self.dtype != torch.float32:
            names = {weight: name for name, weight in self._weights.items()}
            wrapped.register_comm_hook(names, self._average_in_fp32)
        return wrapped

    def _average_in_fp32(self, names: dict[Tensor, str], bucket: GradBucket) -> Future[Tensor]:
        """DDP's hook: the replicas' means of what all micro-batches added up to, kept in `_averaged`.

        DDP itself would average the last micro-batch's gradients only, and in bf16. It still says which weights had a
        gradient on any replica: those of the others it leaves None.
        """
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        found = [(names[weight], gradient.float()) for weight, gradient in pairs]
        for name, gradient in found:
            before = self._masters[name].grad
            if before is not None:
                gradient.add_(before)
        flat = torch.cat([gradient.flatten() for _, gradient in found]).div_(self.world.num_replicas)
        pieces = torch.split(flat, [gradient.numel() for _, gradient in found])
        for (name, gradient), piece in zip(found, pieces, strict=True):
            self._averaged[name] = piece.view_as(gradient)
        sent = dist.all_reduce(flat, group=self.world.replicas, async_op=True)
        future: Future[Tensor] = sent.get_future().then(lambda _: bucket.buffer())
        return future

    def _add(self, master: nn.Parameter, averaged: Tensor | None, gradient: Tensor) -> None:
        if averaged is not None:
            master.grad = averaged  # holds what was added up before
        elif master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient.float())

    def _norm(self) -> Tensor:
        """Norm of the gradients of the whole network."""
        parts = self._gradients()
        if not self._cuts:
            return get_total_norm(parts[0])
        return self._root(parts, sharded=False)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of whole weights, and of those that are cut over the tensor ranks."""
        found = {name: p.grad for name, p in self._masters.items() if p.grad is not None}
        whole_ones = [gradient for name, gradient in found.items() if name not in self._cuts]
        return whole_ones, [gradient for name, gradient in found.items() if name in self._cuts]

    def _root(self, parts: Sequence[Sequence[Tensor]], sharded: bool) -> Tensor:
        """The norm over all ranks of gradients (whole, cut over tensor ranks), which may be sharded over replicas."""
        zero = torch.zeros((), device=self.device)
        norms = [get_total_norm(part).to(self.device) if part else zero for part in parts]
        squares = torch.stack(norms).square()
        if sharded:
            dist.all_reduce(squares, group=self.world.replicas)
        if self.world.tensor is not None:
            dist.all_reduce(squares[1:], group=self.world.tensor)
        return squares.sum().sqrt()

    def _advance(self) -> None:
        with warnings.catch_warnings():
            # torch takes a schedule that moves without an update for a mistake; here it is a step without one.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self._scheduler.step()

    def _joined(self, name: str, shard: Tensor) -> Tensor:
        """The full tensor of this rank's shard. Together."""
        if name not in self._cuts:
            return shard
        group = self.world.tensor
        assert group is not None  # nothing is cut without one
        shards = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return self._cuts[name].join(shards)

    def _cut(self, name: str, full: Tensor) -> Tensor:
        """This rank's shard of a full tensor."""
        if name not in self._cuts:
            return full
        assert self.world.tensor is not None
        return self._cuts[name].take(full, self.world.tensor_rank, self.world.tensor.size())

    def _check(self, masters: Mapping[str, Tensor]) -> None:
        for name in sorted({*self._shapes} ^ {*masters}):
            found = tuple(masters[name].shape) if name in masters else None
            raise EngineError(_differs(name, found, self._shapes.get(name)))

    def _restore_moments(self, moments: Moments) -> None:
        names = {master: name for name, master in self._masters.items()}
        state = {}
        # As the optimizer numbers its weights.
        for index, master in enumerate(p for group in self._optimizer.param_groups for p in group["params"]):
            name = names[master]
            if name in moments.updates:
                state[index] = {
                    "step": torch.tensor(float(moments.updates[name])),
                    "exp_avg": self._cut(name, moments.mean[name]).to(self.device, copy=True),
                    "exp_avg_sq": self._cut(name, moments.square[name]).to(self.device, copy=True),
                }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.dtype != torch.float32:
            for name, weight in self._weights.items():
                weight.copy_(self._masters[name])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def share_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank takes each name, so that none has more than a share of the sizes and one largest item."""
    taken, keepers = [0] * ranks, {}
    for name, size in sizes.items():
        keepers[name] = taken.index(min(taken))
        taken[keepers[name]] += size
    return keepers


def _differs(name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    return (
        f"the weights are of another network: they hold {name} as {found}, the model has {wanted}; restore the recipe "
        f"they were trained with, or train into another folder"
    )
