"""Pipeline parallelism: a network's blocks cut into stages, each of which is held by one rank of a pipeline.

A stage runs its blocks between those of its neighbours: activations come from the stage before and go on to the stage
behind, gradients come back. The last stage's output is sent to all, so that every rank makes the same loss; what it
gives backward counts on the last stage alone. All stages hold what lies outside the blocks (embeddings, final layer:
under 1 % of the network of 2.0), each finds a part of its gradients, and an engine adds the parts up.

Stages wait for each other, as no two micro-batches are under way at once: this saves memory and no time. What draws
from torch's global generator inside blocks (`drop_path`, dropout of adapters) draws the same numbers in every stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ml.engines.fsdp import leaves
from ml.engines.protocol import EngineError
from ml.models.mmdit_blocks import DoubleBlock
from ml.models.recompute import Recompute
from ml.models.stdit3 import STDiT3


class Wire(Protocol):
    """What is used of `colossalai.pipeline.p2p.PipelineP2PCommunication`: tensors to and from neighbouring stages.

    Both that receive give the tensors and handles of what is still under way, which is nothing.
    """

    def send_forward(self, output_object: list[Tensor]) -> Any:
        """Activations to the stage behind."""
        ...

    def recv_forward(self) -> tuple[list[Tensor], Any]:
        """Activations from the stage before."""
        ...

    def send_backward(self, input_object: list[Tensor]) -> Any:
        """Gradients to the stage before."""
        ...

    def recv_backward(self) -> tuple[list[Tensor], Any]:
        """Gradients from the stage behind."""
        ...


class Elsewhere(nn.Module):
    """In the place of a block that another stage holds; `streams` tensors go through such a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.streams = streams_of(block)


@dataclass
class Stage:
    """One stage of a network: what it is in place of the network's `recompute`, through which all blocks are run.

    `first` is the block that takes activations from the stage before, `behind` that which takes ours; None at either
    end. `owners` is the stage that holds a block, by the block's name.
    """

    inner: Recompute
    wire: Wire
    group: ProcessGroup
    first: nn.Module | None
    behind: nn.Module | None
    owners: Mapping[str, int]
    shared: Sequence[nn.Parameter]
    _sent: tuple[Tensor, ...] = field(default=(), init=False)

    def run(self, block: nn.Module | Callable[..., Any], chosen: bool, *given: Any) -> Any:
        """What a block of this stage makes of its inputs; those of other stages pass on what they are given."""
        if block is self.behind:
            self._sent = given[: streams_of(block)]
            self.wire.send_forward([tensor.detach() for tensor in self._sent])
        if isinstance(block, Elsewhere):
            return given[0] if block.streams == 1 else given[: block.streams]
        if block is self.first:
            given = (*_Open.apply(self, _anchor(given[0])), *given[streams_of(block) :])  # type: ignore[no-untyped-call]
        return self.inner.run(block, chosen, *given)

    def close(self, network: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """A forward hook of the network: the last stage's output, in place of what this stage made of nothing."""
        sent, self._sent = self._sent, ()
        ends = [output] if self.is_last else sent
        lacking = self._lacking(ends) if self.shared and torch.is_grad_enabled() else []
        own = output if self.is_last else output.detach()
        closed: Tensor = _Close.apply(self, _anchor(output), own, len(sent), *sent, *lacking)  # type: ignore[no-untyped-call]
        return closed

    @property
    def is_last(self) -> bool:
        """Whether the network ends here."""
        return self.behind is None

    def owner(self, name: str) -> int | None:
        """The stage that holds a weight; None where all do."""
        return self.owners.get(_block_of(name))

    @torch.no_grad()
    def spread(self, name: str, tensor: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
        """A tensor laid out as a whole weight, from the stage that holds it to all. Together."""
        owner = self.owner(name)
        if owner is None:
            assert tensor is not None
            return tensor
        found = torch.empty(*shape, device=device) if tensor is None else tensor.contiguous()
        dist.broadcast(found, src=dist.get_global_rank(self.group, owner), group=self.group)
        return found

    def names(self, here: Sequence[str]) -> set[str]:
        """The names that any stage has. Together."""
        found: list[Any] = [None] * self.group.size()
        dist.all_gather_object(found, list(here), group=self.group)
        return {name for names in found for name in names}

    def _lacking(self, ends: Sequence[Tensor]) -> list[nn.Parameter]:
        """Weights outside blocks that this stage's part of the graph does not reach and another's does. Together."""
        reached = set[int]().union(*(leaves(end) for end in ends))
        here = torch.tensor([id(weight) in reached for weight in self.shared], dtype=torch.uint8)
        anywhere = here.clone()
        # On the host, so that nothing waits for the device.
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.group)
        return [weight for weight, lacks in zip(self.shared, (anywhere > here).tolist(), strict=True) if lacks]


def cut_(network: nn.Module, group: ProcessGroup, wire: Wire) -> Stage:
    """Leave this rank's stage of a network, in place: blocks of other stages are dropped, weights keep their names.

    Raises EngineError for a network without blocks, or with fewer than stages.
    """
    places, stages, mine = running_order(network), group.size(), group.rank()
    if not hasattr(network, "recompute"):
        raise EngineError(f"{type(network).__name__} has no blocks to cut into stages: set pipeline_parallel to 1")
    if len(places) < stages:
        raise EngineError(
            f"{type(network).__name__} has {len(places)} block(s) for {stages} pipeline stages: set pipeline_parallel "
            f"to {max(1, len(places))} or less"
        )
    names = {id(child): name for name, child in network.named_children()}
    starts = cuts([sum(w.numel() for w in blocks[index].parameters()) for blocks, index in places], stages)
    owners = {}
    for place, (blocks, index) in enumerate(places):
        owner = sum(start <= place for start in starts) - 1
        owners[f"{names[id(blocks)]}.{index}"] = owner
        if owner != mine:
            blocks[index] = Elsewhere(blocks[index])
    ends = [blocks[index] for blocks, index in (places[start] for start in starts)]
    shared = [w for name, w in network.named_parameters() if w.requires_grad and _block_of(name) not in owners]
    stage = Stage(
        cast(Recompute, network.recompute),
        wire,
        group,
        first=ends[mine] if mine else None,
        behind=ends[mine + 1] if mine + 1 < stages else None,
        owners=owners,
        shared=shared,
    )
    network.recompute = stage  # type: ignore[assignment]
    network.register_forward_hook(stage.close)
    return stage


def running_order(network: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Where the blocks of a transformer are, in the order in which they run."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    places = [(blocks, index) for blocks in lists for index in range(len(blocks))]
    # Spatial and temporal blocks take turns.
    return sorted(places, key=lambda place: place[1]) if isinstance(network, STDiT3) else places


def cuts(sizes: Sequence[int], stages: int) -> list[int]:
    """Where stages start among blocks of such sizes: as near to even shares as can be, and none is empty."""
    ends = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
    starts = [0]
    for stage in range(1, stages):
        free = range(starts[-1] + 1, len(sizes) - (stages - stage) + 1)
        share = ends[-1] * stage / stages
        starts.append(min(free, key=lambda place: abs(ends[place] - share)))
    return starts


def streams_of(block: Any) -> int:
    """How many tensors run through the blocks: text and picture through a double block, else one."""
    return block.streams if isinstance(block, Elsewhere) else 1 + isinstance(block, DoubleBlock)


class _Open(torch.autograd.Function):
    """Activations from the stage before; backward, their gradients to it. The anchor makes it differentiable."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.stage = stage
        return tuple(stage.wire.recv_forward()[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.stage.wire.send_backward([gradient.contiguous() for gradient in gradients])
        return None, None


class _Close(torch.autograd.Function):
    """The last stage's output; backward, gradients of what was sent from the stage behind, and zeros for weights.

    Takes the anchor, this stage's output, how many tensors were sent, these, and the weights.
    """

    @staticmethod
    def forward(ctx: Any, stage: Stage, anchor: Tensor, own: Tensor, sent: int, *others: Tensor) -> Tensor:
        ctx.stage, ctx.sent, ctx.weights = stage, sent, others[sent:]
        output = own.contiguous().clone() if stage.is_last else torch.empty_like(own.contiguous())
        last = dist.get_global_rank(stage.group, stage.group.size() - 1)
        dist.broadcast(output, src=last, group=stage.group)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        zeros = [torch.zeros_like(weight) for weight in ctx.weights]
        if ctx.stage.is_last:
            return None, None, gradient, None, *zeros
        found = ctx.stage.wire.recv_backward()[0]
        return None, None, None, None, *found, *zeros


def _anchor(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device, requires_grad=True)


def _block_of(name: str) -> str:
    """The block that a weight would be of: `blocks.3` of `blocks.3.attn.qkv.weight`."""
    return ".".join(name.split(".")[:2])
