"""How much memory one rank of a stage takes, before anything is started, and whether its device has it.

A rank holds states, activations and buffers. States, for P weights of which T are trained, d ranks that shard them
(data x sequence), and e = 2 (bf16) or 4 (fp32) bytes; tensor ranks come first, and cut attention and MLPs only:

    sharding        weights   gradients          masters   moments   moving average
    none, fp32         4 P        4 T (*)            -        8 T        4 T
    none, bf16         2 P        4 T + 2 T (*)     4 T       8 T        4 T
    zero1              e P        e T              4 T/d     8 T/d      4 T/d
    zero2              e P        e T/d            4 T/d     8 T/d      4 T/d
    full              4 P/d       4 T/d (**)         -       8 T/d      4 T/d

(ZeRO: arXiv 1910.02054. Plain bf16 adds gradients up in fp32, beside the bf16 ones of a backward pass. *: several ranks
have a copy in buckets, e T more, and bf16 with `accumulate` the sums before the last micro-batch, 4 T more. **: 4 T
with `accumulate`, as sums are whole until the last micro-batch.) Activations
are `ml/activations.py`'s. Buffers: two gathered blocks and a block's gradients in flight (`full`), or four reduction
buckets (ZeRO; data parallel). To every process comes an allowance for what is no tensor of ours: on a GPU the CUDA
context, kernels, NCCL's channels and what the allocator cannot use, on a CPU the interpreter and libraries.

Where clips are encoded while training (`loading.source: clips`) or samples shown (`validation.prompts`), the weights of
autoencoder and text encoder are there too. What these compute for a moment is NOT counted: leave room for it.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath

import psutil

from ml import counts
from ml.activations import Activations, autoencoder_activations, bytes_of, stage_activations
from ml.architectures import DCAENet, MMDiT
from ml.methods import Engine, engine_problems, memory_levers
from ml.plan import Cell
from ml.recipe import Recipe
from ml.sections import AutoencoderStage, Compute, Stage
from ml.shapes import Size, nominal_area, sizes_of

GIB = 2**30
# Memory of one device as it is sold, in GiB of its data sheet.
DEVICE_GIB = {
    "A100": 80.0,
    "A800": 80.0,
    "H100": 80.0,
    "H800": 80.0,
    "H200": 141.0,
    "B200": 180.0,
    "L40S": 48.0,
    "L4": 24.0,
}
# Of that, what the driver keeps or the data sheet rounds up: torch is shown 79.2 of an H100's 80, 139.8 of 141.
DRIVER_GIB = 1.2
# Context and kernels about 0.5, NCCL about 1 over several communicators, the rest for what is cut up: an assumption.
CUDA_GIB = 2.0
# Resident memory of a training process before its first tensor: 0.4 GiB after `import ml.train` (torch 2.13, x86-64),
# and what libraries take that are loaded later (assumed).
HOST_GIB = 0.6
# Numbers in a reduction bucket: ColossalAI's default of 12 Mi; torch's data parallel has 25 MiB, less than this.
BUCKET = 12 * 2**20
# Weights of an autoencoder at the published widths, counted: 1.2's is a pair.
AUTOENCODER_WEIGHTS = {"sd": 84e6, "opensora_v1_2": 393e6, "opensora_v1_3": 259e6, "hunyuan": 246e6, "dc_ae": 459e6}
SPATIAL_WEIGHTS, PUBLISHED_WIDTH = 84e6, 128
# Weights of text encoders, counted: T5 v1.1 XXL's encoder, with CLIP-L's, and all-MiniLM-L6-v2. In fp32, as Google's
# files of T5 and the packaged MiniLM are, and as an autoencoder is loaded.
TEXT_WEIGHTS = {"t5": 4_762_310_656, "t5_clip": 4_762_310_656 + 123_060_480, "minilm": 22_713_216}
ENCODER_BYTES = 4
MOST_DEVICES = 4096

AnyStage = Stage | AutoencoderStage


class MemoryModelError(ValueError):
    """A question about memory that has no answer: an unknown device, or ranks that do not divide."""


@dataclass(frozen=True)
class States:
    """Bytes of what lives through all of training, on one rank."""

    weights: float
    gradients: float
    masters: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank while it trains on a batch of one bucket."""

    states: States
    activations: Activations
    batch: int
    buffers: float
    overhead: float
    encoders: float = 0.0

    @property
    def fixed(self) -> float:
        """What does not depend on the batch."""
        return self.states.total + self.buffers + self.overhead + self.encoders

    @property
    def total(self) -> float:
        """At the widest moment of a step."""
        return self.fixed + self.batch * self.activations.peak


def memory(recipe: Recipe, stage: AnyStage, cell: Cell, batch: int | None = None, devices: int | None = None) -> Memory:
    """Of one rank on a bucket (resolution, frames), at its own batch and on its own hardware where none is given.

    Raises MemoryModelError when the stage's sequence, tensor and pipeline ranks do not divide the ranks.
    """
    weights, shards = _weights(recipe, stage), _shards(stage, devices)
    return Memory(
        states=_states(stage, weights, shards),
        activations=_activations(recipe, stage, cell),
        batch=_batch(stage, cell) if batch is None else batch,
        buffers=_buffers(stage.engine, weights, shards),
        overhead=GIB * (HOST_GIB if stage.compute.on_cpu else CUDA_GIB),
        encoders=_encoders(recipe, stage),
    )


def cells(stage: AnyStage) -> list[Cell]:
    """The buckets that a stage may see, in the recipe's order; a phase of the autoencoder has one."""
    if isinstance(stage, AutoencoderStage):
        return [(stage.resolution, stage.frames)]
    return [
        (r, frames) for r, lengths in stage.buckets.items() for frames, bucket in lengths.items() if bucket.keep > 0
    ]


def worst(recipe: Recipe, stage: AnyStage, devices: int | None = None) -> tuple[Cell, Memory]:
    """The bucket that takes the most, and what it takes."""
    found = [(cell, memory(recipe, stage, cell, devices=devices)) for cell in cells(stage)]
    return max(found, key=lambda pair: pair[1].total)


def available(compute: Compute) -> float:
    """Bytes that one rank may use: its GPU's, or on a CPU its share of this machine's memory and cgroup's limit.

    Raises MemoryModelError for an accelerator whose memory is not known.
    """
    if compute.on_cpu:
        return min(psutil.virtual_memory().total, cgroup_limit()) / (compute.processes or 1)
    name = compute.accelerators.split(":")[0]
    if name not in DEVICE_GIB:
        raise MemoryModelError(
            f"no memory is known for {name!r}; known: {', '.join(DEVICE_GIB)} (add its data sheet's to ml/memory.py)"
        )
    return usable(DEVICE_GIB[name])


def cgroup_limit(root: Path = Path("/")) -> float:
    """Bytes that this process's control groups, of either version, allow it and its like; infinite without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    found = [math.inf]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        inner = PurePosixPath(path.lstrip("/"))
        # A container may show its own group at the root, whatever the path says.
        for group in (inner, *inner.parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):
                    found.append(float(int((base / group / name).read_text(encoding="ascii"))))
    return min(found)


def usable(gib: float) -> float:
    """Bytes that are left to a process of a device sold with so many GiB."""
    return (gib - DRIVER_GIB) * GIB


def fits(recipe: Recipe, stage: AnyStage, space: float | None = None, devices: int | None = None) -> bool:
    """Whether every bucket fits into `space` bytes a rank (None = what its own device has)."""
    return worst(recipe, stage, devices)[1].total <= (available(stage.compute) if space is None else space)


def min_devices(recipe: Recipe, stage: AnyStage, space: float) -> int | None:
    """The fewest ranks of `space` bytes on which the stage fits at its batches; None where more do not help."""
    unit = stage.engine.model_ranks
    most = MOST_DEVICES // unit
    if not fits(recipe, stage, space, most * unit):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(recipe, stage, space, middle * unit) else (middle + 1, high)
    return low * unit


def largest_batch(recipe: Recipe, stage: AnyStage, cell: Cell, space: float, devices: int | None = None) -> int:
    """How many examples of a bucket fit a rank of `space` bytes (in sequence parallel: a group of ranks); 0 = none."""
    found = memory(recipe, stage, cell, 1, devices)
    return max(0, math.floor((space - found.fixed) / found.activations.peak))


def suggestions(recipe: Recipe, stage: AnyStage, space: float) -> list[str]:
    """What would make a stage fit, one sentence each, every one tried with this estimate; empty when nothing does."""
    return [words for words, changed in _ways(recipe, stage) if fits(recipe, changed, space)]


def _ways(recipe: Recipe, stage: AnyStage) -> Sequence[tuple[str, AnyStage]]:
    """Changes of a stage that the recipe accepts and what to call them, the mildest first."""
    ways = list[tuple[str, AnyStage]]()
    if isinstance(stage, Stage):
        for words, engine in memory_levers(stage.engine, stage.compute.ranks):
            if not engine_problems(engine, recipe.network, stage.lora):
                ways.append((words, stage.model_copy(update={"engine": engine})))
    return ways + [(f"a {part} of every batch", _smaller(stage, n)) for part, n in (("half", 2), ("quarter", 4))]


def _smaller(stage: AnyStage, share: int) -> AnyStage:
    if isinstance(stage, AutoencoderStage):
        return stage.model_copy(update={"batch": max(1, stage.batch // share)})
    lengths = {
        r: {n: b.model_copy(update={"batch": max(1, b.batch // share)}) for n, b in row.items()}
        for r, row in stage.buckets.items()
    }
    return stage.model_copy(update={"buckets": lengths})


# --- states and buffers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Weights of a rank before they are sharded: all, those that are trained, those of one block, of no block."""

    whole: float
    trained: float
    block: float
    ends: float


def _states(stage: AnyStage, weights: Weights, shards: int) -> States:
    engine, size, trained = stage.engine, bytes_of(stage.engine.precision), weights.trained
    average = 4 * trained if stage.ema_decay is not None else 0.0
    if engine.sharding == "none":
        gradients, narrow = 4 * trained, engine.precision == "bf16"
        gradients += 2 * trained * narrow
        gradients += (size * trained + 4 * trained * narrow * _accumulates(engine, shards)) * (shards > 1)
        return States(size * weights.whole, gradients, 4 * trained * narrow, 8 * trained, average)
    moments, average = 8 * trained / shards, average / shards
    if engine.sharding == "full":
        gradients = 4 * trained / (1 if _accumulates(engine, shards) else shards)
        return States(4 * weights.whole / shards, gradients, 0.0, moments, average)
    gradients = size * trained / (shards if engine.sharding == "zero2" else 1)
    return States(size * weights.whole, gradients, 4 * trained / shards, moments, average)


def _accumulates(engine: Engine, shards: int) -> bool:
    """Whether a step has several micro-batches."""
    if engine.batches_per_step is None:
        return engine.accumulate > 1
    return engine.batches_per_step * engine.sequence_parallel > shards


def _buffers(engine: Engine, weights: Weights, shards: int) -> float:
    """Gathered: two blocks and what is no block's, with a block's gradients as they are and in fp32; else buckets."""
    if shards == 1:
        return 0.0
    size = bytes_of(engine.precision)
    if engine.sharding == "full":
        return size * (2 * weights.block + weights.ends) + (size + 4) * weights.block
    return float(4 * BUCKET * size)


def _shards(stage: AnyStage, devices: int | None) -> int:
    """Ranks that states are cut over: data x sequence."""
    ranks, engine = stage.compute.ranks if devices is None else devices, stage.engine
    if ranks % engine.model_ranks:
        raise MemoryModelError(
            f"{stage.name}: {ranks} ranks are no multiple of sequence x tensor x pipeline = {engine.model_ranks}; "
            "change compute or the engine's parallel sizes"
        )
    return ranks // (engine.tensor_parallel * engine.pipeline_parallel)


def _weights(recipe: Recipe, stage: AnyStage) -> Weights:
    if isinstance(stage, AutoencoderStage):
        # Convolutions are cut, which is all of it but 3 in 100.
        whole, trained = (count / stage.engine.tensor_parallel for count in _autoencoder_weights(recipe, stage))
        return Weights(whole, trained, whole / 4, 0.0)
    model, engine = recipe.network, stage.engine
    elsewhere = 1 - 1 / engine.tensor_parallel
    whole_blocks, (cut, cut_ends) = counts.block_parameters(model), counts.tensor_parameters(model)
    depths = (model.depth, model.depth_single_blocks) if isinstance(model, MMDiT) else (model.depth,)
    within = sum(depth * size for depth, size in zip(depths, whole_blocks, strict=True))
    ends = counts.parameters(model) - within - cut_ends * elsewhere
    one = [size - part * elsewhere for size, part in zip(whole_blocks, cut, strict=True)]
    blocks = sum(depth * size for depth, size in zip(depths, one, strict=True))
    held = ends + blocks / engine.pipeline_parallel
    if stage.lora is None:
        return Weights(held, held, max(one), ends)
    adapters = counts.adapter_lanes(model, stage.lora.targets) * stage.lora.rank
    return Weights(held + adapters, adapters, max(one), ends)


def _encoders(recipe: Recipe, stage: AnyStage) -> float:
    """Bytes of autoencoder and text encoder, where clips are encoded or samples are shown."""
    if isinstance(stage, AutoencoderStage):
        return 0.0
    shows = stage.validation is not None and bool(stage.validation.prompts)
    weights = _autoencoder_size(recipe)[0] + TEXT_WEIGHTS[recipe.text.kind]
    return ENCODER_BYTES * weights * (stage.loading.source == "clips" or shows)


def _autoencoder_weights(recipe: Recipe, stage: AutoencoderStage) -> tuple[float, float]:
    """Weights of the autoencoder, and those that a phase trains."""
    whole, scale = _autoencoder_size(recipe)
    spatial = SPATIAL_WEIGHTS * scale
    return whole, {"all": whole, "spatial": spatial, "temporal": whole - spatial}[stage.part]


def _autoencoder_size(recipe: Recipe) -> tuple[float, float]:
    """Weights of the autoencoder, and what the published ones are scaled by: the square of the width."""
    net = recipe.autoencoder.net
    if isinstance(net, DCAENet):
        width = net.widths[0]
    else:
        width = net.ch if net.kind == "opensora_v1_3" else net.block_out_channels[0]
    scale = (width / PUBLISHED_WIDTH) ** 2
    return AUTOENCODER_WEIGHTS[net.kind] * scale, scale


# --- activations --------------------------------------------------------------------------------------------------


def _activations(recipe: Recipe, stage: AnyStage, cell: Cell) -> Activations:
    if isinstance(stage, AutoencoderStage):
        return _clip(recipe, stage)
    resolution, frames = cell
    grid = recipe.strides.grid(_largest(recipe, resolution), frames)
    return stage_activations(recipe.network, grid, recipe.text.max_tokens, stage.engine)


def _clip(recipe: Recipe, stage: AutoencoderStage) -> Activations:
    found = autoencoder_activations(recipe.autoencoder.net, stage)
    return replace(found, kept=found.kept * nominal_area(stage.resolution))


def _largest(recipe: Recipe, resolution: str) -> Size:
    return max(sizes_of(resolution, recipe.strides.pixels).values(), key=lambda size: size.area)


def _batch(stage: AnyStage, cell: Cell) -> int:
    return stage.batch if isinstance(stage, AutoencoderStage) else stage.buckets[cell[0]][cell[1]].batch
