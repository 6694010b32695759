"""Low-rank adapters (arXiv 2106.09685): a linear layer W x becomes W x + alpha / rank B (A x), and only A and B learn.

Adapters live inside the network under peft's names (`<layer>.lora_A.default.weight`), so an engine trains, averages and
saves them like any weights; the rest of the network is frozen. What leaves training is a whole network under its own
names (`merged`), or the adapters alone in the files that peft and diffusers read (`save_adapter`).
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ml.engines.protocol import Tensors
from ml.methods import Lora

# What peft calls an adapter that nobody named.
ADAPTER = "default"
# Before every name in peft's files, which know networks as wrapped by it (peft/utils/save_and_load.py).
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


class LoraError(ValueError):
    """Adapters that do not fit a network, with what would."""


def add_lora(network: nn.Module, section: Lora, seed: int) -> None:
    """Freeze a network and put adapters beside the linear layers that the section targets; A is drawn, B is zero.

    The network says bit for bit what it said. Raises LoraError when a target ends the name of no linear layer, or the
    network has adapters already.
    """
    from peft import inject_adapter_in_model

    if any("lora_" in name for name, _ in network.named_parameters()):
        raise LoraError("the network has adapters already: merge them first")
    layers = _targeted(network, section.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_config(section, layers), network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged(network: nn.Module, section: Lora, trained: Mapping[str, Tensor]) -> Tensors:
    """The state of a network that has no adapters, with W + alpha / rank B A wherever trained adapters say so.

    Sums in float32, on the CPU. Raises LoraError when an adapter belongs to no layer of the network, or is not whole.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    for layer, (down, up) in _pairs(trained).items():
        name = f"{layer}.weight"
        if name not in state or state[name].shape != (up.shape[0], down.shape[1]):
            found = tuple(state[name].shape) if name in state else "no such layer"
            raise LoraError(f"adapter of {layer} is for {up.shape[0]} x {down.shape[1]}, the network has {found}")
        change = section.alpha / section.rank * (up.float() @ down.float())
        state[name] = (state[name].float() + change).to(state[name].dtype)
    return state


def save_adapter(folder: Path, section: Lora, trained: Mapping[str, Tensor]) -> None:
    """Write trained adapters as peft does: `adapter_model.safetensors` and `adapter_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    _config(section, list(_pairs(trained))).save_pretrained(str(folder))
    named = {f"{PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in trained.items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, folder / WEIGHTS)


def _targeted(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that end in a target, whole parts of a name compared."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(_ends(name, target) for name in linear):
            endings = sorted({".".join(name.split(".")[-1 - target.count(".") :]) for name in linear})
            near = get_close_matches(target, endings, n=3) or endings
            raise LoraError(
                f"lora: no linear layer of {type(network).__name__} ends in {target!r}; near it are {', '.join(near)}"
            )
    return [name for name in linear if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _config(section: Lora, layers: list[str]) -> Any:
    from peft import LoraConfig

    # Its arithmetic takes any number, whatever its annotation.
    alpha: Any = section.alpha
    return LoraConfig(r=section.rank, lora_alpha=alpha, lora_dropout=section.dropout, target_modules=layers)


def _pairs(trained: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank,in] and B [out,rank] of every adapted layer."""
    down, up = (f".lora_{part}.{ADAPTER}.weight" for part in "AB")
    layers = {name.removesuffix(down).removesuffix(up) for name in trained}
    missing = sorted({f"{layer}{part}" for layer in layers for part in (down, up)} ^ set(trained))
    if missing or not layers:
        raise LoraError(
            f"not the adapters of a network: {', '.join(missing) or 'nothing'} is there alone or not at all"
        )
    return {layer: (trained[layer + down].cpu(), trained[layer + up].cpu()) for layer in sorted(layers)}
