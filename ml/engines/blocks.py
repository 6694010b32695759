"""The blocks of a network: what is sharded, compiled or laid out one by one."""

from collections.abc import Callable, Mapping

from torch import nn

from ml.engines.protocol import Cut, EngineError
from ml.engines.sequence import sequence_parallel
from ml.engines.tensor import shard_
from ml.engines.world import World
from ml.methods import Engine

Prepare = Callable[[nn.Module], Mapping[str, Cut]]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The items of the outermost `nn.ModuleList`s, in the order of registration."""
    if isinstance(network, nn.ModuleList):
        return list(network)
    return [block for child in network.children() for block in blocks_of(child)]


def compile_blocks(network: nn.Module) -> None:
    """Compile every block by itself: blocks of one kind share what is compiled, and the rest stays as it is.

    Blocks are compiled when they first run, and keep their names and types.
    """
    for block in blocks_of(network):
        block.compile()


def whole(network: nn.Module) -> Mapping[str, Cut]:
    """Leave a network as it is: no weight of it is cut."""
    return {}


def parallel(section: Engine, world: World) -> Prepare:
    """What is done to a network before it is placed: its tokens and weights are cut over ranks, its blocks compiled.

    The sharding of an engine comes after compiling, so that compiled blocks do not trace the gathering of weights.
    What is returned raises EngineError for a network that has no tokens to cut.
    """

    def prepare(network: nn.Module) -> Mapping[str, Cut]:
        cuts: Mapping[str, Cut] = {}
        if world.sequence is not None:
            if not hasattr(network, "sp"):
                raise EngineError(f"{type(network).__name__} has no tokens to cut: set sequence_parallel to 1")
            network.sp = sequence_parallel(section.sequence_mode, world.sequence)  # type: ignore[assignment]
        if world.tensor is not None:
            cuts = shard_(network, world.tensor)
        if section.compile:
            compile_blocks(network)
        return cuts

    return prepare
