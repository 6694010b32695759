"""How large a transformer is and how much it computes, in closed form: learned parameters, FLOPs of a forward pass.

Letters: h width, r MLP ratio, L text tokens, (t, h, w) latent grid; T frames and S tokens of a frame in the grid of
tokens, N = T S, n = N + L. Only products count (a multiplication and an addition are two FLOPs), as torch's
FlopCounterMode counts them, in the blocks

    MMDiT             (double + single) (24 h^2 n + 4 h n^2)                            at r = 4
    STDiT, STDiT-2    depth (36 h^2 N + 4 h N (S + T + L) + 4 h^2 L)
    STDiT-3           depth (56 h^2 N + 4 h N (S + T + 2 L) + 8 h^2 L)

and in the embeddings and the last layer. Windows of 1.3 attend as computed: whole, with their padding. Every
published text token counts (1.x drops padding before attention), and nothing is given, so what 1.3 does with the
latents of given frames is left out. Each layer is stated once, so its size and its work cannot disagree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ml.architectures import MMDiT, Model, SpatialTemporal, STDiT, STDiT2, STDiT3

__all__ = [
    "Grid",
    "adapter_lanes",
    "block_flops",
    "block_parameters",
    "forward_flops",
    "parameters",
    "recomputed_fraction",
    "tensor_parameters",
    "token_grid",
]

Grid = tuple[int, int, int]
# Sinusoids of a time or a size, before they are embedded (om/layers/blocks.py, om/mmdit/model.py).
FEATURES = 256


@dataclass(frozen=True)
class Tally:
    """Learned parameters and FLOPs of a layer, or of many."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.parameters + other.parameters, self.flops + other.flops)

    def __mul__(self, times: int) -> "Tally":
        return Tally(self.parameters * times, self.flops * times)


def parameters(model: Model) -> int:
    """Learned parameters of a resolved section (`Recipe.network`); buffers, such as the null caption, do not count.

    759.6M (1.0), 767.5M (1.1), 1,207.6M (1.2; 3,182M at width 1872), 1,208.0M (1.3), 11.89B (2.0) as published.
    """
    return _network(model, (1, 1, 1), 1).parameters


def forward_flops(model: Model, grid: Grid, text_tokens: int) -> int:
    """FLOPs of one forward pass over one example of a latent grid (t, h, w) and so many text tokens."""
    return _network(model, grid, text_tokens).flops


def block_flops(model: Model, grid: Grid, text_tokens: int) -> int:
    """The blocks' part of `forward_flops`: what utilisation is measured on (all but 0.2 % of 2.0's work)."""
    none = {"depth": 0, **({"depth_single_blocks": 0} if isinstance(model, MMDiT) else {})}
    ends = model.model_copy(update=none)
    return forward_flops(model, grid, text_tokens) - forward_flops(ends, grid, text_tokens)


def token_grid(model: Model, grid: Grid) -> Grid:
    """Tokens along each axis of a latent grid (t, h, w), the last ones filled up where the patch does not divide it."""
    frames, height, width = grid
    deep, down, across = (1, model.patch, model.patch) if isinstance(model, MMDiT) else model.patch_size
    return math.ceil(frames / deep), math.ceil(height / down), math.ceil(width / across)


def block_parameters(model: Model) -> tuple[int, ...]:
    """Learned parameters of one block of each kind: double and single of the MMDiT, block (or pair) of the others."""
    kinds = ("depth", "depth_single_blocks") if isinstance(model, MMDiT) else ("depth",)
    more = [model.model_copy(update={kind: getattr(model, kind) + 1}) for kind in kinds]
    return tuple(parameters(deeper) - parameters(model) for deeper in more)


def tensor_parameters(model: Model) -> tuple[tuple[int, ...], int]:
    """Learned parameters that tensor parallelism cuts (`ml.engines.tensor`): of a block of each kind, and around them.

    Weights of attention and MLP, and the biases of those that are cut by outputs; modulations, norms and tables are
    whole on every rank, and of what is around the blocks all but the captions' MLP of 1.x.
    """
    width, hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    attention, mlp = 4 * width**2 + 3 * width, 2 * width * hidden + hidden
    if isinstance(model, MMDiT):
        double = 2 * (attention - 3 * width * (not model.qkv_bias) + mlp)
        return (double, attention + mlp), 0
    captions = model.caption_channels * width + width + width**2
    if isinstance(model, STDiT3):
        return ((2 * attention + mlp) * (1 if model.skip_temporal else 2),), captions
    return (3 * attention + mlp,), captions


def adapter_lanes(model: Model, targets: Sequence[str]) -> int:
    """Learned numbers of low-rank adapters a rank: inputs and outputs of the blocks' linear layers that targets end.

    Layers around the blocks, which a target may end too (`linear`), are left out.
    """
    layers = [
        (f".{name}", lanes) for count, block in _linears(model) for name, lanes in block.items() for _ in range(count)
    ]
    return sum(lanes for name, lanes in layers if any(name.endswith(f".{target}") for target in targets))


def recomputed_fraction(model: Model, checkpoint_blocks: tuple[int, int]) -> float:
    """Share of the forward pass that backward repeats: (8, 100) of 19 and 38 blocks is 46/57; 14 of 28 blocks, half.

    MMDiT counts double and single blocks, 1.x blocks (STDiT-3: pairs of them) and no second kind.
    """
    first, second = checkpoint_blocks
    if isinstance(model, MMDiT):
        done = min(first, model.depth) + min(second, model.depth_single_blocks)
        return done / (model.depth + model.depth_single_blocks)
    return min(first, model.depth) / model.depth


def _network(model: Model, grid: Grid, text: int) -> Tally:
    tokens = token_grid(model, grid)
    if isinstance(model, MMDiT):
        return _mmdit(model, math.prod(tokens), text)
    if isinstance(model, STDiT3):
        return _stdit3(model, tokens, text)
    return _stdit2(model, tokens, text) if isinstance(model, STDiT2) else _stdit(model, tokens, text)


# --- MMDiT --------------------------------------------------------------------------------------------------------


def _mmdit(model: MMDiT, visual: int, text: int) -> Tally:
    """A token passes one of the two streams of a double block, so those hold twice the weights and do equal work."""
    width, joint = model.hidden_size, _attended(visual + text, visual + text, model.hidden_size)
    double = _stream(model, visual) + _stream(model, text) + joint
    whole = double * model.depth + (_single(model, visual + text) + joint) * model.depth_single_blocks
    embedded = [FEATURES, model.vec_in_dim] + ([FEATURES] if model.guidance_embed else [])
    for size in embedded:
        whole += _linear(size, width, 1) + _linear(width, width, 1)
    if model.cond_embed:
        whole += _linear(model.in_channels + model.patch_size**2, width, visual)
    whole += _linear(model.in_channels, width, visual) + _linear(model.context_in_dim, width, text)
    return whole + _linear(width, 2 * width, 1) + _linear(width, model.in_channels, visual)


def _stream(model: MMDiT, tokens: int) -> Tally:
    """Text or picture in a double block: modulation, projections, norms of query and key, MLP."""
    width = model.hidden_size
    projected = _linear(width, 3 * width, tokens, model.qkv_bias) + _linear(width, width, tokens)
    return _linear(width, 6 * width, 1) + projected + _norms(width, model.num_heads) + _mlp(model, tokens)


def _single(model: MMDiT, tokens: int) -> Tally:
    width, hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    ends = _linear(width, 3 * width + hidden, tokens) + _linear(width + hidden, width, tokens)
    return _linear(width, 3 * width, 1) + ends + _norms(width, model.num_heads)


# --- STDiT, STDiT-2, STDiT-3 --------------------------------------------------------------------------------------


def _stdit(model: STDiT, grid: Grid, text: int) -> Tally:
    block = _spatial(model, grid, False) + _temporal(model, grid, False) + _cross(model, grid, text)
    block += _mlp(model, math.prod(grid)) + _table(6 * model.hidden_size)
    return block * model.depth + _ends(model, grid, text)


def _stdit2(model: STDiT2, grid: Grid, text: int) -> Tally:
    """Blocks as STDiT's, with norms of query and key and a second table; the clip's height, width and aspect are
    embedded at a third of the width, its length and rate at the whole.
    """
    width, third = model.hidden_size, model.hidden_size // 3
    block = _spatial(model, grid, model.qk_norm) + _temporal(model, grid, model.qk_norm) + _cross(model, grid, text)
    block += _mlp(model, math.prod(grid)) + _table(9 * width)
    told = _embedder(third, rows=2) + _embedder(third) + _embedder(width) * 2 + _linear(width, 3 * width, 1)
    return block * model.depth + told + _ends(model, grid, text)


def _stdit3(model: STDiT3, grid: Grid, text: int) -> Tally:
    """Pairs of whole blocks; 1.3 embeds given latents and their mask too, which only an example with them pays for."""
    rest = _cross(model, grid, text) + _mlp(model, math.prod(grid)) + _table(6 * model.hidden_size)
    pair = _spatial(model, grid, model.qk_norm) + rest
    if not model.skip_temporal:
        pair += _temporal(model, grid, model.qk_norm, model.kernel_size) + rest
    whole = pair * model.depth + _embedder(model.hidden_size) + _ends(model, grid, text)
    return whole + _patches(model, rows=0) * 2 if model.embeds_condition else whole


def _spatial(model: SpatialTemporal, grid: Grid, norms: bool) -> Tally:
    """Self-attention within each frame."""
    frames, height, width = grid
    return _self(model, grid, norms, (height * width, frames))


def _temporal(model: SpatialTemporal, grid: Grid, norms: bool, window: Grid | None = None) -> Tally:
    """Self-attention over frames, or within windows (H, W, T; -1 = the whole axis), the last of which are padded."""
    frames, height, width = grid
    axes = (height, width, frames)
    window = (1, 1, -1) if window is None else window
    size = [axis if side == -1 else side for axis, side in zip(axes, window, strict=True)]
    count = math.prod(math.ceil(axis / side) for axis, side in zip(axes, size, strict=True))
    return _self(model, grid, norms, (math.prod(size), count))


def _self(model: SpatialTemporal, grid: Grid, norms: bool, sequences: tuple[int, int]) -> Tally:
    """Projections of a grid's tokens, and their self-attention in sequences of a length and so many of them."""
    width, tokens, (length, count) = model.hidden_size, math.prod(grid), sequences
    tally = _linear(width, 3 * width, tokens) + _linear(width, width, tokens)
    tally += _attended(length, length, width) * count
    return tally + _norms(width, model.num_heads) if norms else tally


def _cross(model: SpatialTemporal, grid: Grid, text: int) -> Tally:
    """Every token attends to the text."""
    width, tokens = model.hidden_size, math.prod(grid)
    products = _linear(width, width, tokens) * 2 + _linear(width, 2 * width, text)
    return products + _attended(tokens, text, width)


def _ends(model: SpatialTemporal, grid: Grid, text: int) -> Tally:
    """Patches, time, caption, and the last layer with its table."""
    width, tokens = model.hidden_size, math.prod(grid)
    whole = _patches(model, tokens) + _embedder(width) + _linear(width, 6 * width, 1)
    whole += _linear(model.caption_channels, width, text) + _linear(width, width, text)
    return whole + _linear(width, math.prod(model.patch_size) * model.out_channels, tokens) + _table(2 * width)


def _patches(model: SpatialTemporal, rows: int) -> Tally:
    return _linear(model.in_channels * math.prod(model.patch_size), model.hidden_size, rows)


def _embedder(width: int, rows: int = 1) -> Tally:
    """A number as a vector; one net for all `rows` numbers."""
    return _linear(FEATURES, width, rows) + _linear(width, width, rows)


def _linears(model: Model) -> list[tuple[int, dict[str, int]]]:
    """(how many blocks, inputs + outputs of each linear layer in one of them by its name)."""
    width, hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    if isinstance(model, MMDiT):
        parts = {"qkv": 4 * width} if model.fused_qkv else {f"{part}_proj": 2 * width for part in "qkv"}
        stream = {f"attn.{part}": lanes for part, lanes in (*parts.items(), ("proj", 2 * width))}
        stream |= {"mlp.0": width + hidden, "mlp.2": width + hidden, "mod.lin": 7 * width}
        double = {f"{side}_{name}": lanes for side in ("img", "txt") for name, lanes in stream.items()}
        single = {"q_proj": 2 * width, "k_proj": 2 * width, "v_mlp": 2 * width + hidden}
        single = {"linear1": 4 * width + hidden} if model.fused_qkv else single
        single |= {"linear2": 2 * width + hidden, "modulation.lin": 4 * width}
        return [(model.depth, double), (model.depth_single_blocks, single)]
    block = {"attn.qkv": 4 * width, "attn.proj": 2 * width, "mlp.fc1": width + hidden, "mlp.fc2": width + hidden}
    block |= {"cross_attn.q_linear": 2 * width, "cross_attn.kv_linear": 3 * width, "cross_attn.proj": 2 * width}
    if isinstance(model, STDiT3):
        return [(model.depth * (1 if model.skip_temporal else 2), block)]
    return [(model.depth, block | {"attn_temp.qkv": 4 * width, "attn_temp.proj": 2 * width})]


# --- layers -------------------------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, rows: int, bias: bool = True) -> Tally:
    """A linear layer, or a convolution that cuts patches, applied to so many rows."""
    return Tally(inputs * outputs + outputs * bias, 2 * rows * inputs * outputs)


def _mlp(model: Model, tokens: int) -> Tally:
    hidden = int(model.hidden_size * model.mlp_ratio)
    return _linear(model.hidden_size, hidden, tokens) + _linear(hidden, model.hidden_size, tokens)


def _attended(queries: int, keys: int, width: int) -> Tally:
    """Products of queries and keys, and of their softmax and the values."""
    return Tally(flops=4 * queries * keys * width)


def _norms(width: int, heads: int) -> Tally:
    """Scales of the norms of query and key."""
    return Tally(2 * (width // heads))


def _table(size: int) -> Tally:
    return Tally(size)
