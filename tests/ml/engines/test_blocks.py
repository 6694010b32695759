from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ml.engines.blocks import blocks_of, compile_blocks, parallel, whole
from ml.engines.protocol import EngineError
from ml.engines.world import World
from ml.methods import Engine

# The compiler's own modules are written with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Nested(nn.Module):
    """Blocks in a list, in a child's list, and a list within a block, which is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])
        self.child = nn.Sequential(nn.ModuleList([nn.GELU()]))


def section(compile: bool = False, sequence: int = 1) -> Engine:
    return Engine(
        kind="plain",
        precision="fp32",
        grad_clip=1.0,
        accumulate=1,
        sequence_parallel=sequence,
        checkpoint_blocks=(0, 0),
        compile=compile,
    )


def compiled(network: nn.Module) -> list[bool]:
    return [block._compiled_call_impl is not None for block in blocks_of(network)]


def test_blocks_are_the_items_of_outermost_lists() -> None:
    network = Nested()
    assert blocks_of(network) == [network.blocks[0], network.blocks[1], network.child[0][0]]
    assert blocks_of(nn.Linear(2, 2)) == []


def test_only_blocks_are_compiled_and_names_stay() -> None:
    network = Nested()
    before = list(network.state_dict())
    compile_blocks(network)
    assert compiled(network) == [True] * 3
    assert network._compiled_call_impl is None
    assert list(network.state_dict()) == before


def test_a_process_alone_changes_nothing_but_what_it_compiles() -> None:
    for asked in (False, True):
        network = Nested()
        before = {name: weight.clone() for name, weight in network.state_dict().items()}
        assert parallel(section(asked), World())(network) == {}
        assert compiled(network) == [asked] * 3
        assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert whole(network) == {}


def refused() -> str:
    asked = section(sequence=2)
    world = World.join(asked, torch.device("cpu"))
    with pytest.raises(EngineError) as error:
        parallel(asked, world)(Nested())
    world.close()
    return str(error.value)


def test_a_network_without_tokens_is_not_cut(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(refused) == ["Nested has no tokens to cut: set sequence_parallel to 1"] * 2
