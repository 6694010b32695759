"""The ColossalAI engine: Booster's ZeRO over the ranks that hold the same weights, or its DDP where nothing is sharded.

Ranks of one sequence group are replicas here: they average gradients with the data ranks (`World.replicas`), and the
network's `sp` seam cuts the tokens. Masters are fp32 in either precision; under ZeRO each rank holds one flat piece of
each, padded to a length that the ranks divide. The norm and the clipping are ours, over tensor ranks too, and a step
that is not finite reaches no optimizer. A pipeline (`ml.engines.pipeline`) talks through ColossalAI's point-to-point.
"""

import gc
import logging
import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup

from ml.engines.blocks import parallel
from ml.engines.pipeline import Stage, cut_
from ml.engines.plain import DTYPES, PlainEngine, trained
from ml.engines.protocol import EngineError, MakeOptimizer, MakeScheduler, Tensors
from ml.engines.reduction import InOrder
from ml.engines.world import World
from ml.methods import Engine as EngineSection

STAGES = {"none": 0, "zero1": 1, "zero2": 2}
INSTALL = "pip install --no-deps colossalai==0.5.0"

log = logging.getLogger(__name__)


def make_colossal(section: EngineSection, device: torch.device, world: World) -> "ColossalEngine":
    """The engine, ready for `setup`.

    Raises EngineError when colossalai is not installed, and where a pipeline is to go together with what it does not.
    """
    if section.pipeline_parallel == 1:
        _prepare(device)
        return ColossalEngine(section, device, world)
    if section.sequence_parallel * section.tensor_parallel > 1:
        raise EngineError(
            f"pipeline_parallel ({section.pipeline_parallel}) goes together with data ranks only: set "
            f"sequence_parallel ({section.sequence_parallel}) and tensor_parallel ({section.tensor_parallel}) to 1, or "
            f"pipeline_parallel to 1"
        )
    _prepare(device)
    if world.rank == 0:
        log.warning("pipeline_parallel is experimental: its stages take turns, so it saves memory and no time")
    return PipelineEngine(section, device, world)


class ColossalEngine(PlainEngine):
    """Data x sequence x tensor ranks under ColossalAI, in fp32, or in bf16 with fp32 masters."""

    def __init__(self, section: EngineSection, device: torch.device, world: World) -> None:
        super().__init__(device, DTYPES[section.precision], section.grad_clip, world, parallel(section, world))
        self._stage = STAGES[section.sharding]
        self._in_order: InOrder | None = None
        self._averages, self._lone = True, False
        # `_optimizer` is torch's, inside the one that ColossalAI made around it.
        self._boosted: Any

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Boost the model; its masters start from the fp32 weights, not from their rounded copies. Together."""
        self._shapes = {name: tuple(weight.shape) for name, weight in trained(model).items()}
        self._cuts = self.prepare(model)
        # On the host: the device need not hold the whole network in fp32, let alone twice.
        exact = {name: weight.detach().cpu().clone() for name, weight in trained(model).items()}
        self._weights = trained(model.to(self.device, self.dtype))
        self._optimizer = optimizer(self._weights.values())
        self._boost(model)
        live = self._boosted.get_working_to_master_map()
        self._masters = {name: live[id(weight)] for name, weight in self._weights.items()}
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(self._piece(exact.pop(name)))
        if self._stage and self.world.replicas is not None:
            self._in_order = InOrder(self._boosted, list(self._weights.values()), self.world.replicas, self.collect)
        self._scheduler = scheduler(self._optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Stage 2 averages every micro-batch and keeps its piece; the others keep all and average the last."""
        self._averages = last or self._stage == 2
        if self._averages:
            return nullcontext()
        return cast(AbstractContextManager[None], self._booster.no_sync(self.model, self._boosted))

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients."""
        in_order = self._in_order if self._averages else None
        if in_order is not None:
            in_order.expect(loss)
        self._booster.backward(loss, self._boosted)
        if in_order is not None:
            in_order.finish()

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients; returns the gradient norm before clipping."""
        norm = float(self._norm())
        if math.isfinite(norm):
            # As torch.nn.utils.clip_grad_norm_ has it, 1e-6 included.
            self._clipper.scale = max(1.0, (norm + 1e-6) / self.grad_clip)
            self._boosted.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the gradients; the schedule advances."""
        self._boosted.zero_grad()
        self._advance()

    def close(self) -> None:
        """Leave the process group; DDP first, for the reason that the plain engine gives."""
        if self._masters:
            self.model = cast(Any, self.model).unwrap()
            gc.collect()
        self.world.close()
        if self._lone and dist.is_initialized():
            dist.destroy_process_group()

    def _boost(self, model: nn.Module) -> None:
        from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin

        precision, made, group, self._clipper = "fp32", self._optimizer, self._replicas(), _clipper()
        if self._stage:
            precision = "fp32" if self.dtype == torch.float32 else "bf16"
            overlap = self.device.type == "cuda"
            plugin = LowLevelZeroPlugin(self._stage, precision, overlap_communication=overlap, cast_inputs=False)
            plugin.zero_optim_kwargs["dp_process_group"] = group
        else:
            plugin = TorchDDPPlugin(find_unused_parameters=True)
            plugin.ddp_kwargs = {"find_unused_parameters": True, "process_group": group}
            # Where weights are fp32 they are their own masters; the name only keeps it from scaling losses.
            made = MixedPrecisionOptimizer(made, precision="bf16")
        self._booster = Booster(plugin=plugin)
        self.model, self._boosted, *_ = self._booster.boost(model, made)
        # Both kinds of optimizer divide gradients by what this says, in fp32, before they update.
        setattr(self._boosted, "mixed_precision_mixin" if self._stage else "mixed_precision", self._clipper)

    def _replicas(self) -> ProcessGroup:
        """The group that gradients are averaged in, of one rank if need be: no group is everybody to ColossalAI."""
        if self.world.replicas is not None:
            return self.world.replicas
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            self._lone = True
        group, _ = dist.new_subgroups(1)  # type: ignore[no-untyped-call]
        return cast(ProcessGroup, group)

    def _norm(self) -> Tensor:
        return self._root(self._gradients(), sharded=self._stage > 0 and self.world.replicas is not None)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of whole weights and of cut ones, in fp32: under ZeRO the pieces that this rank will update."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, weight in self._weights.items():
            found = self._found(weight)
            if found is not None:
                parts[self._apart(name)].append(found.float())
        return parts

    def _found(self, weight: nn.Parameter) -> Tensor | None:
        """The live gradient of a weight, or this rank's piece of it."""
        gradient: Tensor | None = self._boosted.get_working_grad_by_param_id(id(weight)) if self._stage else weight.grad
        return gradient

    def _apart(self, name: str) -> bool:
        """Whether other ranks of this one's group of the model hold something else of a weight than this one."""
        return name in self._cuts

    def _joined(self, name: str, shard: Tensor) -> Tensor:
        return super()._joined(name, self._replicated(name, shard))

    def _cut(self, name: str, full: Tensor) -> Tensor:
        return self._piece(super()._cut(name, full))

    def _piece(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a weight of its network."""
        if not self._stage:
            return tensor
        ranks = self.world.num_replicas
        length = -(-tensor.numel() // ranks)
        padded = nn.functional.pad(tensor.flatten(), (0, length * ranks - tensor.numel()))
        place = 0 if self.world.replicas is None else self.world.replicas.rank()
        return padded[place * length : (place + 1) * length]

    def _replicated(self, name: str, piece: Tensor) -> Tensor:
        """The weight of this rank's network that the replicas hold the pieces of. Together."""
        if not self._stage:
            return piece
        pieces = [piece]
        if self.world.replicas is not None:
            pieces = [torch.empty_like(piece) for _ in range(self.world.num_replicas)]
            dist.all_gather(pieces, piece.contiguous(), group=self.world.replicas)
        shape = self._weights[name].shape
        return torch.cat(pieces)[: shape.numel()].view(shape)

    @torch.no_grad()
    def _publish(self) -> None:
        """Put the masters, joined and rounded, into the network's weights."""
        for name, weight in self._weights.items():
            weight.copy_(self._replicated(name, self._masters[name]))


class PipelineEngine(ColossalEngine):
    """Data x pipeline ranks: each holds one stage of the network, and the optimizer's state of it."""

    _part: Stage

    def setup(self, model: nn.Module, optimizer: MakeOptimizer, scheduler: MakeScheduler) -> None:
        """Cut the model, then boost this rank's stage of it. Together."""
        assert self.world.pipeline is not None
        shapes = {name: tuple(weight.shape) for name, weight in trained(model).items()}
        self._part = cut_(model, self.world.pipeline, self._wire())
        super().setup(model, optimizer, scheduler)
        self._shapes = shapes

    def step(self) -> float:
        """Add up what the stages found for the weights that all of them hold; then as without a pipeline."""
        for name, weight in self._weights.items():
            gradient = self._found(weight)
            if gradient is None or self._apart(name):
                continue
            found = gradient.float()
            dist.all_reduce(found, group=self.world.pipeline)
            gradient.copy_(found)
        return super().step()

    def gather(self, shards: Mapping[str, Tensor], spread: bool = False) -> Tensors:
        """Copies on the CPU, of the weights of all stages."""
        names = self._part.names(list(shards))
        # What another stage holds gets its room when its turn comes.
        laid = {name: torch.empty(self._shapes[name], device="meta") for name in names} | {**shards}
        return super().gather({name: laid[name] for name in self._shapes if name in names}, spread)

    def scatter(self, full: Mapping[str, Tensor]) -> Tensors:
        """Copies on the device, of this stage's weights."""
        return {name: self._cut(name, full[name]).to(self.device, copy=True) for name in full if name in self._masters}

    def _wire(self) -> Any:
        """ColossalAI's talk between stages. Together."""
        from colossalai.cluster import ProcessGroupMesh
        from colossalai.pipeline import p2p
        from colossalai.pipeline.stage_manager import PipelineStageManager

        # Theirs asks torch for hccl, which torch may not know, and does not see NCCL in a group that has gloo too.
        p2p._check_for_nccl_hccl_backend = lambda group: self.device.type == "cuda"
        mesh = ProcessGroupMesh(self.data_size, self.size // self.data_size)
        return p2p.PipelineP2PCommunication(PipelineStageManager(mesh, 1), overlap_p2p=False)

    def _norm(self) -> Tensor:
        sharded = self._stage > 0 and self.world.replicas is not None
        # Weights that all stages hold count once.
        shared, own = (self._root([part], sharded).square() for part in self._gradients())
        dist.all_reduce(own, group=self.world.pipeline)
        return (shared + own).sqrt()

    def _apart(self, name: str) -> bool:
        return self._part.owner(name) is not None

    def _joined(self, name: str, shard: Tensor) -> Tensor:
        full = None if shard.is_meta else super()._joined(name, shard)
        return self._part.spread(name, full, self._shapes[name], self.device)


def _prepare(device: torch.device) -> None:
    """Import colossalai quietly and tell it where it runs. Raises EngineError when it is not installed."""
    with warnings.catch_warnings():
        # About apex and TensorNVMe, which nothing here uses, and about what its dependencies use of torch.jit.
        warnings.filterwarnings("ignore", "Please install", UserWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        try:
            from colossalai.accelerator import set_accelerator
            from colossalai.booster import plugin  # noqa: F401
            from colossalai.logging import get_dist_logger
        except ImportError as error:
            raise EngineError(f"engine colossal needs ColossalAI ({error}): {INSTALL}") from error
    get_dist_logger().set_level("WARNING")
    # Names that ColossalAI still uses for two collectives.
    warnings.filterwarnings("ignore", r"`torch.distributed.(reduce_scatter|all_gather_into)_tensor`", FutureWarning)
    set_accelerator("cuda" if device.type == "cuda" else _host())


def _host() -> Any:
    """An accelerator that is the CPU: ColossalAI's own refuses the streams that ZeRO asks for, under this name."""
    from colossalai.accelerator import CpuAccelerator

    class Host(CpuAccelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"

        def synchronize(self, device: Any = None) -> None:
            """Nothing runs behind."""

        def current_stream(self, device: Any = None) -> None:
            """There is one."""

        def Stream(self, *args: Any, **kwargs: Any) -> None:  # noqa: N802 (the vendor's name)
            """There is one."""

        def stream(self, stream: Any) -> AbstractContextManager[None]:
            """Stay in it."""
            return nullcontext()

    return Host()


def _clipper() -> Any:
    """What the optimizers ask for the number that gradients are divided by."""
    from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin

    class Clipper(BF16MixedPrecisionMixin):  # type: ignore[misc]
        scale = 1.0

        def get_grad_div_scale(self) -> float:
            return self.scale

    return Clipper()
