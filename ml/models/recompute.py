"""Activations that are not kept: what a block keeps of its forward pass for the backward pass, and where.

Every transformer of the house runs its blocks through `Recompute`, which an engine sets. Recomputation repeats a
block's collectives too, on all ranks alike, so it goes together with every way of distributing the network.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ml.models.host import Parked, park

# Matrix products and attention of aten: little memory for the work that they took.
KEPT = frozenset(
    (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
# Packages of attention register their kernels under names that start so.
ATTENTION = "flash_attn"

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Recompute:
    """How the blocks chosen by `checkpoint_blocks` save memory.

    `block` keeps a block's inputs and makes the rest again; `selective` also keeps what matrix products and attention
    gave; `offload` keeps what is kept in pinned memory of the host. `compiled` says that the blocks are: the compiler
    then carries out `selective` itself, on the device.
    """

    kind: Literal["block", "selective"] = "block"
    offload: bool = False
    compiled: bool = False

    def run(self, block: nn.Module | Callable[..., Any], chosen: bool, *given: object) -> Any:
        """What a block makes of its inputs; `chosen` blocks keep less of it, and only while gradients are taken."""
        if not chosen or not torch.is_grad_enabled():
            return block(*given)
        with saved_tensors_hooks(park, Parked.take) if self.offload else nullcontext():
            if self.kind == "block":
                return checkpoint(block, *given, use_reentrant=False)
            if self.compiled:
                return _compiled()(block, *given)
            contexts = _parking if self.offload else _saving
            return checkpoint(block, *given, use_reentrant=False, context_fn=contexts)


def keeps(op: Any) -> bool:
    """Whether `selective` keeps what an operator of torch's gave."""
    namespace, _, name = op.name().partition("::")
    return name.partition(".")[0] in KEPT if namespace == "aten" else namespace.startswith(ATTENTION)


@cache
def _compiled() -> Callable[..., Any]:
    """The selective region as the compiler takes it: whole, for it decides for itself what a graph saves."""
    return torch.compile(_selective)


def _selective(block: nn.Module, *given: object) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *given, use_reentrant=False, context_fn=contexts)


def _saving() -> Contexts:
    """Around the forward pass of a block, and around its repetition."""
    contexts: Contexts = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return contexts


def _parking() -> Contexts:
    shelf: list[Any] = []
    return _Keeping(shelf), _Taking(shelf)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Parks what kept operators give, in order."""

    def __init__(self, shelf: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shelf = shelf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if keeps(func):
            self.shelf.append(tree_map_only(Tensor, park, out))
        return out


class _Taking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives it back in that order in place of computing it."""

    def __init__(self, shelf: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shelf = shelf
        self._left: Iterator[Any] = iter(())

    def __enter__(self) -> Any:
        self._left = iter(self.shelf)
        tree_map_only(Parked, Parked.start, self.shelf)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if keeps(func):
            return tree_map_only(Parked, Parked.take, next(self._left))
        return func(*args, **(kwargs or {}))
