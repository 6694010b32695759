"""Weights in memory as if they lay in a file, and small networks as targets."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import Tensor, nn

from ml import architectures
from ml.models.official.files import Header, Official
from ml.models.official.rules import Target

MakeOfficial = Callable[[Mapping[str, Tensor]], Official]
MakeTarget = Callable[..., Target]


@pytest.fixture
def official() -> MakeOfficial:
    """Factory `official(state)`."""

    def make(state: Mapping[str, Tensor]) -> Official:
        headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        return Official(Path("weights.safetensors"), (), headers, (), state.__getitem__)

    return make


@pytest.fixture
def target() -> MakeTarget:
    """Factory `target(network, config, recipe="mine")`."""

    def make(
        network: nn.Module, config: architectures.Model | architectures.AutoencoderNet, recipe: str = "mine"
    ) -> Target:
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return Target(recipe, config.kind, config.model_dump(mode="json"), wanted)

    return make
