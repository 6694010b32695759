"""Levers of a stage's engine that change the network itself, before an engine takes it: recomputation and fp8.

Compiling is the third lever, and the engines pull it (`ml.engines.blocks.compile_blocks`), as it comes after they have
cut the network. Block by block it also fuses what is between the matrix products: norm and modulation, gate and
residual, rotary positions are plain torch in `ml/models` and become one kernel each, so the house has no kernels of its
own.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ml import methods
from ml.engines.blocks import blocks_of
from ml.models.layers import Modulation
from ml.models.recompute import Recompute

# Products of 8-bit matrices take sizes of multiples of 16 (torch._scaled_mm).
MULTIPLE = 16
# Hopper is the first with 8-bit products whose scale differs from row to row.
CAPABILITY = (9, 0)

log = logging.getLogger(__name__)


class LeverError(ValueError):
    """A lever that cannot be pulled: what is in its way, and what to change or install."""


@dataclass(frozen=True)
class Converted:
    """Linear layers of the blocks: how many compute in 8 bits now, and how many do not as 16 divides not their size."""

    converted: int
    left: int


def prepare(network: nn.Module, section: methods.Engine) -> None:
    """Pull the levers of a section on a network of fp32 weights: names, shapes and values of its weights stay.

    Raises LeverError when the network has none of them, or a package is missing; levers that exclude each other are
    refused by the section itself.
    """
    if hasattr(network, "recompute"):
        network.checkpoint_blocks = section.checkpoint_blocks  # type: ignore[assignment]
        network.recompute = Recompute(section.recompute, section.offload, section.compile)  # type: ignore[assignment]
    elif section.checkpoint_blocks != (0, 0):
        raise LeverError(f"{type(network).__name__} cannot recompute its blocks; set checkpoint_blocks to [0, 0]")
    if section.fp8:
        done = convert_to_fp8(network)
        log.info("fp8: %d linear layers converted, %d left as they are", done.converted, done.left)


def convert_to_fp8(network: nn.Module) -> Converted:
    """Have the linear layers of the blocks compute in 8 bits, scaled row by row; modulations and the rest stay.

    Without a GPU that can (Hopper or later) the rounding is emulated, which is slow. Raises LeverError without
    torchao, and when there is no layer to convert.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise LeverError(f"fp8 needs torchao ({error}): pip install torchao, or set fp8 to false") from error
    linear = _linear_layers(network)
    chosen = {id(layer) for layer in linear if not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)}
    if not chosen:
        raise LeverError(
            f"fp8: {type(network).__name__} has no linear layer in its blocks whose sizes are multiples of {MULTIPLE}; "
            "set fp8 to false"
        )
    # Tokens are what the gradient of a weight sums over: their number is any, so it is padded.
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=not _has_fp8())
    convert_to_float8_training(network, module_filter_fn=lambda module, _: id(module) in chosen, config=config)
    return Converted(len(chosen), len(linear) - len(chosen))


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    """Linear layers of the blocks, but those that make modulations."""
    modules = [module for block in blocks_of(network) for module in block.modules()]
    modulating = {id(inner) for module in modules if isinstance(module, Modulation) for inner in module.modules()}
    return [m for m in modules if isinstance(m, nn.Linear) and id(m) not in modulating]


def _has_fp8() -> bool:
    capability: Any = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return bool(capability >= CAPABILITY)
