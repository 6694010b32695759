"""What a training step keeps for its backward pass, counted: bytes of one example on one rank.

Letters: h width, r MLP ratio, e bytes of a number (2 in bf16, 4 in fp32), N tokens of an example (in the MMDiT with its
text), L text tokens. A block keeps e (outer + inner + mlps r) + 4 wide bytes a token and width:

    bytes at r = 4          fp32   bf16 |                          fp32   bf16
    MMDiT, double            100     54 | STDiT                     116     58
    MMDiT, single             84     46 | STDiT-2                   168     96
    fused: double            104     54 | STDiT-3, spatial          108     62
    fused: single             84     50 | STDiT-3, temporal         112     64

and one or two numbers a head besides. They are counts of these very modules on torch's CPU kernels, which
`tests/ml/test_activations.py` repeats; fused attention keeps no products of queries and keys on any device. The
published 46 and 38 bytes of the MMDiT in bf16 leave out what norms of query and key keep in float32.

The count is of whole texts (1.x drops padding first) and without given frames; dropped paths (`drop_path`) and frozen
weights change it and are left out. Autoencoders are estimated by pixels, to a tenth at published widths and more
roughly elsewhere; a discriminator and LPIPS are not in it.
"""

import math
from dataclasses import dataclass

from ml.architectures import AutoencoderNet, DCAENet, MMDiT, Model, OpenSoraV13Net, SpatialTemporal, STDiT2, STDiT3
from ml.counts import Grid, token_grid
from ml.methods import Engine
from ml.sections import AutoencoderStage

__all__ = ["Activations", "autoencoder_activations", "bytes_of", "stage_activations"]

SINGLE = 4
BYTES = {"fp32": SINGLE, "bf16": 2}
# Gradients of a block's input and of what is between, beside what the block keeps: counted, 4.6 (MMDiT) and less.
GRADIENTS = 5
# Where nothing is made again, the widest moment is the last block's: counted, 7 values a token.
TRANSIENT = 7
# Copies of the latent in float32: latents, noise, noisy, target, prediction, their difference, its square, a gradient.
LATENTS = 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one example on one rank: `kept` between the passes, `live` more at the widest moment, `host` parked."""

    kept: float
    live: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes on the device at the widest moment."""
        return self.kept + self.live


@dataclass(frozen=True)
class Block:
    """What a block keeps, in values of the width a token (see the module); `inner` and `wide` are cut by tensor ranks.

    `mlps` hidden layers of the MLP, `reads` texts it attends to (two values a text token), `heads` float32 numbers a
    head. `products` are what matrix products and attention give, one hidden layer apart. `padded` of `inner` and all
    of `wide` grow with the padding of windows.
    """

    outer: int = 0
    inner: int = 0
    wide: int = 0
    heads: int = 0
    products: int = 0
    mlps: int = 0
    reads: int = 0
    padded: int = 0

    def __add__(self, other: "Block") -> "Block":
        return Block(*(getattr(self, name) + getattr(other, name) for name in Block.__dataclass_fields__))


@dataclass(frozen=True)
class Example:
    """One example as one rank sees it: tokens, text tokens that blocks read, padded share of windows, the engine."""

    tokens: float
    text: float
    padding: float
    engine: Engine

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return bytes_of(self.engine.precision)


# MMDiT: (fused_qkv) -> double and single block. Fused projections stay whole in memory while a part of them is needed.
DOUBLE = {False: Block(8, 7, 2, 3, 6, 2), True: Block(8, 9, 1, 3, 6, 2)}
SINGLE_BLOCK = {False: Block(4, 7, 2, 3, 5, 2), True: Block(4, 5, 4, 3, 5, 2)}
# Self-attention: projections and output; norms of query and key keep their inputs in float32.
ATTENTION, TURNED = Block(0, 4, 0, 1, 5), Block(0, 6, 0, 1, 5)
NORMED, ROPE_FIRST = Block(0, 4, 4, 3, 5), Block(0, 8, 2, 3, 5)
WINDOW = Block(0, 6, 4, 3, 5, 0, 0, 6)
# What follows self-attention in every block of 1.x: cross-attention and the MLP.
LISTENING = Block(9, 2, 0, 1, 4, 2, 1)


def bytes_of(precision: str) -> int:
    """Bytes of a number of `engine.precision`."""
    return BYTES[precision]


def stage_activations(model: Model, grid: Grid, text_tokens: int, engine: Engine) -> Activations:
    """Of one example of a latent grid (t, h, w) and so many text tokens, under an engine.

    `model` is the resolved section (`Recipe.network`). Sequence ranks share tokens, tensor ranks what blocks keep
    inside; pipelines are counted as one stage, which holds for as many micro-batches in flight as there are stages.
    """
    visual, ranks = math.prod(token_grid(model, grid)), engine.sequence_parallel
    joint = isinstance(model, MMDiT)
    tokens = (visual + text_tokens) / ranks if joint else visual / ranks
    example = Example(tokens, 0 if joint else text_tokens, _padding(model, grid), engine)
    ends = _ends(model, visual / ranks, text_tokens / (ranks if joint else 1), example.size) + _latents(model, grid)
    runs = [_held(model, run, example) for run in _runs(model, engine.checkpoint_blocks)]
    kept = ends + sum(run.kept for run in runs)
    width = model.hidden_size * example.size * tokens
    peak, held = kept + TRANSIENT * width, kept
    for run in reversed(runs):
        peak = max(peak, held + run.live + GRADIENTS * width * (run.live > 0))
        held -= run.kept
    return Activations(kept, peak - kept, sum(run.host for run in runs))


@dataclass(frozen=True)
class Run:
    """Rounds of the same blocks one after another, all of them made again in the backward pass or none."""

    blocks: tuple[Block, ...]
    rounds: int
    again: bool


def _held(model: Model, run: Run, example: Example) -> Activations:
    """What a run keeps, and what more the first of its blocks to be made again brings to life."""
    whole = [_kept(model, block, example) for block in run.blocks]
    if not run.again:
        return Activations(run.rounds * sum(whole), 0.0)
    less = [_recomputed(model, block, example) for block in run.blocks]
    if example.engine.offload:
        return Activations(0.0, max(whole) if run.rounds else 0.0, run.rounds * sum(less))
    live = max(a - b for a, b in zip(whole, less, strict=True))
    return Activations(run.rounds * sum(less), live if run.rounds else 0.0)


def _kept(model: Model, block: Block, example: Example) -> float:
    """Bytes that a block keeps."""
    cut, size = example.engine.tensor_parallel, example.size
    padding = example.padding if block.padded else 1.0
    inner = block.inner + block.padded * (padding - 1) + block.mlps * _ratio(model)
    numbers = size * (block.outer + inner / cut) + SINGLE * block.wide * padding / cut
    heads = SINGLE * block.heads * model.num_heads / cut
    return example.tokens * (numbers * model.hidden_size + heads) + _read(model, block, example)


def _recomputed(model: Model, block: Block, example: Example) -> float:
    """Bytes that a block keeps which is made again: its input, and under `selective` what its products gave."""
    width, cut = model.hidden_size * example.size, example.engine.tensor_parallel
    if example.engine.recompute == "block":
        return example.tokens * width
    hidden = _ratio(model) * block.mlps / 2
    whole = 1 + (block.products + hidden) / cut
    return example.tokens * (width * whole + SINGLE * model.num_heads / cut) + _read(model, block, example)


def _read(model: Model, block: Block, example: Example) -> float:
    """Keys and values of the text."""
    return 2 * block.reads * example.text * model.hidden_size * example.size / example.engine.tensor_parallel


def _runs(model: Model, checkpoint: tuple[int, int]) -> list[Run]:
    """The blocks in the order of the network: of every kind, those that are made again come first."""
    kinds: list[tuple[tuple[Block, ...], int]]
    if isinstance(model, MMDiT):
        fused = model.fused_qkv
        kinds = [((DOUBLE[fused],), model.depth), ((SINGLE_BLOCK[fused],), model.depth_single_blocks)]
    else:
        kinds = [(_round(model), model.depth)]
    runs = []
    for (blocks, depth), chosen in zip(kinds, checkpoint, strict=False):
        runs += [Run(blocks, min(depth, chosen), True), Run(blocks, max(0, depth - chosen), False)]
    return runs


def _round(model: SpatialTemporal) -> tuple[Block, ...]:
    """One block of STDiT or STDiT-2, or a pair of STDiT-3's."""
    if not isinstance(model, STDiT2 | STDiT3):
        return (ATTENTION + ATTENTION + LISTENING + Block(outer=2),)
    spatial, turned = (NORMED, NORMED) if model.qk_norm else (ATTENTION, TURNED)
    if model.qk_norm and model.qk_norm_legacy:
        turned = ROPE_FIRST
    if isinstance(model, STDiT2):
        return (spatial + turned + LISTENING + Block(outer=5),)
    if model.skip_temporal:
        return (spatial + LISTENING,)
    temporal = turned + Block(outer=1) if model.kernel_size is None else WINDOW
    return (spatial + LISTENING, temporal + LISTENING)


def _ends(model: Model, visual: float, text: float, size: int) -> float:
    """Around the blocks: the last layer's input, norm and modulation, positions, the embedded text, the output."""
    width = model.hidden_size
    if isinstance(model, MMDiT):
        turned = SINGLE * width / model.num_heads * (visual + text)
        read = size * text * model.context_in_dim
        return size * width * (3 * visual + text) + turned + size * visual * model.in_channels + read
    out = SINGLE * visual * math.prod(model.patch_size) * model.out_channels
    return size * width * 3 * (visual + text) + out + size * text * model.caption_channels


def _latents(model: Model, grid: Grid) -> float:
    """Copies of the latent that a step makes around the network."""
    channels = model.in_channels // model.patch_size**2 if isinstance(model, MMDiT) else model.in_channels
    return float(LATENTS * SINGLE * channels * math.prod(grid))


def _ratio(model: Model) -> float:
    return int(model.hidden_size * model.mlp_ratio) / model.hidden_size


def _padding(model: Model, grid: Grid) -> float:
    """Tokens in whole windows over tokens of the grid."""
    if not isinstance(model, STDiT3) or model.kernel_size is None:
        return 1.0
    frames, height, width = token_grid(model, grid)
    axes = zip((height, width, frames), model.kernel_size, strict=True)
    return math.prod(1.0 if side == -1 else math.ceil(axis / side) * side / axis for axis, side in axes)


# --- autoencoders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Numbers kept a pixel of the first frame and of every further one, at the published first width of 128."""

    first: float
    further: float


# Counted over encoder and decoder at 128 x 128 pixels, 17 frames (DC-AE: 64 x 64, 8), float32.
AUTOENCODERS = {
    "sd": Pixels(8_750, 8_780),
    "opensora_v1_2": Pixels(12_510, 9_450),
    "opensora_v1_3": Pixels(34_700, 9_000),
    "hunyuan": Pixels(19_700, 10_100),
    "dc_ae": Pixels(11_140, 10_010),
}
# Of 1.2's two networks: the inner one alone, encoder of frames passed without keeping; and the outer one alone.
PARTS = {"temporal": Pixels(9_450, 6_350), "spatial": Pixels(8_750, 8_780)}
PUBLISHED_WIDTH = 128


def autoencoder_activations(net: AutoencoderNet, stage: AutoencoderStage) -> Activations:
    """Of one clip of a phase of the autoencoder: numbers a pixel, scaled by the network's first width and its layers.

    A rough figure: at published widths within a tenth of the count, at others within a half.
    """
    pixels = AUTOENCODERS[net.kind] if stage.part == "all" else PARTS[stage.part]
    numbers = pixels.first + pixels.further * (stage.frames - 1)
    return Activations(numbers * _scale(net) * bytes_of(stage.engine.precision), 0.0)


def _scale(net: AutoencoderNet) -> float:
    """How much less a smaller network keeps: its first width, and its layers."""
    if isinstance(net, DCAENet):
        depth = sum(net.encoder_depths) + sum(net.decoder_depths)
        published = sum(DCAENet().encoder_depths) + sum(DCAENet().decoder_depths)
        return net.widths[0] / PUBLISHED_WIDTH * depth / published
    if isinstance(net, OpenSoraV13Net):
        return net.ch / PUBLISHED_WIDTH * (2 * net.num_res_blocks + 1) / 5
    return net.block_out_channels[0] / PUBLISHED_WIDTH * (2 * net.layers_per_block + 1) / 5
