"""The layouts in which the same MMDiT is stored, and how its weights go from one to another, exactly and back.

Projections are fused (`qkv`, `linear1`: Flux) or split (`q_proj`, `k_proj`, `v_proj`, `v_mlp`: Open-Sora 2.0), and the
lanes of a head are interleaved (lane 2j turns with 2j + 1: Flux) or half-split (j with j + D/2: Open-Sora 2.0). All
functions map weights to new weights under the names of their layout, leave every other tensor as it is, and work on
meta tensors too; splitting gives views of the fused tensors.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

INTERLEAVED, HALF_SPLIT = "(n d p) ... ", "(n p d) ... "


class LayoutMismatch(ValueError):  # noqa: N818  (the house names it so)
    """Weights that lack a part of a projection, or whose sizes do not fit the stated width or number of heads."""


def split_qkv(state: Mapping[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """Fused to split: `qkv` [3W,W] to three projections, `linear1` [3W+H,W] to `q_proj`, `k_proj`, `v_mlp` [W+H,W].

    Weights that are split already stay as they are. Raises LayoutMismatch when a tensor does not fit `hidden_size`.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base, layer, kind = _parts(name)
        if layer not in ("qkv", "linear1"):
            split[name] = tensor
            continue
        third = "v_proj" if layer == "qkv" else "v_mlp"
        if tensor.shape[0] < 3 * hidden_size or (layer == "qkv" and tensor.shape[0] != 3 * hidden_size):
            raise LayoutMismatch(f"{name} has {tensor.shape[0]} rows, which do not fit a width of {hidden_size}")
        rows = tensor.tensor_split([hidden_size, 2 * hidden_size])
        split |= {f"{base}{part}.{kind}": row for part, row in zip(("q_proj", "k_proj", third), rows, strict=True)}
    return split


def fuse_qkv(state: Mapping[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """Split to fused, the inverse of `split_qkv`.

    Weights that are fused already stay as they are. Raises LayoutMismatch when a projection lacks a part, or when a
    query does not fit `hidden_size`.
    """
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base, layer, kind = _parts(name)
        if layer == "q_proj":
            if tensor.shape[0] != hidden_size:
                raise LayoutMismatch(f"{name} has {tensor.shape[0]} rows, not the width {hidden_size}")
            single = f"{base}v_mlp.{kind}" in state
            names = [f"{base}{part}.{kind}" for part in ("q_proj", "k_proj", "v_mlp" if single else "v_proj")]
            if missing := [part for part in names if part not in state]:
                raise LayoutMismatch(f"{name} cannot be fused: {', '.join(missing)} is missing")
            fused[f"{base}{'linear1' if single else 'qkv'}.{kind}"] = torch.cat([state[part] for part in names])
        elif layer not in ("k_proj", "v_proj", "v_mlp"):
            fused[name] = tensor
    return fused


def to_half_split(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Interleaved to half-split lanes, in either layout of projections: 2d -> d and 2d + 1 -> D/2 + d in every head.

    Rows of queries and keys move, their biases, and the scales of their norms. Raises LayoutMismatch when rows do not
    divide into `num_heads` heads of even size.
    """
    return _reorder(state, num_heads, f"{INTERLEAVED}-> {HALF_SPLIT}")


def to_interleaved(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Half-split to interleaved lanes, the inverse of `to_half_split`."""
    return _reorder(state, num_heads, f"{HALF_SPLIT}-> {INTERLEAVED}")


def _reorder(state: Mapping[str, Tensor], num_heads: int, pattern: str) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base, layer, _ = _parts(name)
        heads = 1 if layer in ("query_norm", "key_norm") else num_heads
        if layer in ("q_proj", "k_proj", "query_norm", "key_norm"):
            moved[name] = _lanes(name, tensor, heads, pattern)
        elif layer in ("qkv", "linear1"):
            turned = 2 * state[f"{base}{layer}.weight"].shape[1]
            rows = _lanes(name, tensor[:turned], 2 * heads, pattern)
            moved[name] = torch.cat([rows, tensor[turned:]])
        else:
            moved[name] = tensor
    return moved


def _lanes(name: str, tensor: Tensor, heads: int, pattern: str) -> Tensor:
    """Reorder the rows of `heads` heads."""
    if tensor.shape[0] % (2 * heads):
        raise LayoutMismatch(f"{name} has {tensor.shape[0]} rows, which do not divide into {heads} heads of even size")
    moved: Tensor = rearrange(tensor, pattern, n=heads, p=2)
    return moved


def _parts(name: str) -> tuple[str, str, str]:
    """`single_blocks.0.q_proj.weight` -> (`single_blocks.0.`, `q_proj`, `weight`)."""
    module, _, kind = name.rpartition(".")
    base, dot, layer = module.rpartition(".")
    return base + dot, layer, kind
