"""The engine that a recipe asks for, on the hardware that it asks for."""

import torch

from ml.engines.blocks import parallel
from ml.engines.fsdp import FsdpEngine
from ml.engines.plain import DTYPES, PlainEngine
from ml.engines.protocol import Engine, EngineError
from ml.engines.world import World, local_rank, started
from ml.methods import Engine as EngineSection
from ml.sections import Compute


def make_engine(section: EngineSection, compute: Compute) -> Engine:
    """Join the ranks that were started, and drive them as the section says. Together.

    Raises EngineError when other than `compute.ranks` processes were started, when these cannot be cut as the section
    asks, or when a device is not here.
    """
    if started() != compute.ranks:
        raise EngineError(
            f"compute asks for {compute.ranks} process(es) ({compute.accelerators} on {compute.nodes} node(s)), "
            f"{started()} started: {how_to_start(compute)}"
        )
    device = device_of(compute)
    world = World.join(section, device)
    if section.kind == "colossal":
        from ml.engines.colossal import make_colossal

        return make_colossal(section, device, world)
    # One replica has nothing to shard over.
    sharded = section.sharding == "full" and world.replicas is not None
    kind = FsdpEngine if sharded else PlainEngine
    return kind(device, DTYPES[section.precision], section.grad_clip, world, parallel(section, world))


def how_to_start(compute: Compute) -> str:
    """The command that starts as many processes as a recipe asks for."""
    if compute.ranks == 1:
        return "start one, without torchrun, or set compute.processes"
    each = compute.ranks // compute.nodes
    nodes = "--standalone" if compute.nodes == 1 else f"--nnodes {compute.nodes} --node-rank N --master-addr HOST"
    return f"start torchrun {nodes} --nproc-per-node {each} -m ml.train ..., or set compute.processes"


def device_of(compute: Compute) -> torch.device:
    """The device of this process on the hardware that a recipe asks for; processes of a CPU share its cores.

    Raises EngineError when there is no such device here.
    """
    if compute.on_cpu:
        torch.set_num_threads(max(1, compute.devices // compute.ranks))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError(f"compute asks for {compute.accelerators}, and torch sees no CUDA device here")
    mine = local_rank()
    if mine is None:
        return torch.device("cuda")
    if mine >= torch.cuda.device_count():
        raise EngineError(
            f"process {mine} of this node has no GPU of its own: torch sees {torch.cuda.device_count()}, compute asks "
            f"for {compute.accelerators}"
        )
    torch.cuda.set_device(mine)
    return torch.device("cuda", mine)
