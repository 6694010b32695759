"""How a stage is trained: the engine that distributes it, where batches come from, and what is done when it goes wrong.

Sections of a recipe, as those of `ml/sections.py`: frozen, refusing unknown keys, each with its unit and its bounds.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ml.architectures import Model, STDiT3
from ml.section import Fraction, Positive, PositiveFloat, Section


class Engine(Section):
    """How training is distributed, in which precision, and what is traded for memory.

    `plain` is torch alone: one device, or under torchrun data parallel, `sharding: none` as DDP, `full` as FSDP2.
    `colossal` is ColossalAI's Booster: `none`, `zero1`, `zero2`. Ranks are cut into data x sequence x tensor, or data x
    pipeline: `pipeline_parallel` stages, of `colossal` and transformers only, each hold a share of the blocks and take
    turns. That is experimental, and saves memory, not time.

    `checkpoint_blocks` says how many blocks of each kind keep no activations: `recompute: block` makes all of them
    again, `selective` keeps what matrix products and attention gave; `offload` keeps what is kept of them on the host.
    `compile` compiles block by block; `fp8` computes the blocks' linear layers in 8 bits.
    """

    kind: Literal["plain", "colossal"]
    precision: Literal["fp32", "bf16"]
    grad_clip: PositiveFloat
    accumulate: Positive
    sequence_parallel: Positive
    checkpoint_blocks: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    sharding: Literal["none", "zero1", "zero2", "full"] = "none"
    sequence_mode: Literal["ulysses", "ring"] = "ulysses"
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    recompute: Literal["block", "selective"] = "block"
    offload: bool = False
    compile: bool = False
    fp8: bool = False
    batches_per_step: Positive | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Each kind shards its own way; levers that exclude each other, or have nothing to work on, are refused."""
        allowed = {"plain": ("none", "full"), "colossal": ("none", "zero1", "zero2")}[self.kind]
        if self.sharding not in allowed:
            raise ValueError(f"engine {self.kind} takes sharding {' or '.join(allowed)}, not {self.sharding}")
        if self.kind == "plain" and self.pipeline_parallel > 1:
            raise ValueError("engine plain has no pipeline: set pipeline_parallel to 1, or kind to colossal")
        if problem := next(self._lever_problems(), None):
            raise ValueError(problem)
        return self

    def _lever_problems(self) -> Iterator[str]:
        if self.fp8 and self.precision != "bf16":
            yield f"fp8 shortens what is computed in bf16, precision is {self.precision}: set it to bf16"
        if self.fp8 and self.tensor_parallel > 1:
            yield "fp8 layers cannot be cut over tensor ranks: set tensor_parallel to 1, or fp8 to false"
        if self.compile and self.offload and self.recompute == "selective":
            yield (
                "a compiled block keeps what is selected on the device: set offload to false, recompute to block, or "
                "compile to false"
            )
        chosen = {"offload": self.offload, "recompute: selective": self.recompute == "selective"}
        for name in (name for name, asked in chosen.items() if asked and self.checkpoint_blocks == (0, 0)):
            yield f"{name} works on the blocks of checkpoint_blocks, which is [0, 0]: raise that, or leave it out"

    def micro_batches(self, data_ranks: int) -> int:
        """Batches that each data rank computes in a step; raises ValueError when the ranks cannot share a step."""
        if self.batches_per_step is None:
            return self.accumulate
        if self.batches_per_step % data_ranks:
            raise ValueError(
                f"batches_per_step: {self.batches_per_step} batches cannot be shared by {data_ranks} data ranks: take "
                "a number of ranks that divides it"
            )
        return self.batches_per_step // data_ranks

    @property
    def model_ranks(self) -> int:
        """Ranks that share one batch: sequence x tensor x pipeline."""
        return self.sequence_parallel * self.tensor_parallel * self.pipeline_parallel


class Guard(Section):
    """What is done about steps gone wrong.

    A step whose loss or gradient is not finite makes no update. `patience` such steps in a row, or a loss above `spike`
    times the median of the last `window` losses (None = never), send training back to its last checkpoint, past the
    batches that did it; after `rollbacks` of these it stops.
    """

    spike: PositiveFloat | None = None
    window: Positive = 50
    patience: Positive = 3
    rollbacks: Annotated[int, Field(ge=0)] = 2


class Loading(Section):
    """Where batches come from and who reads them.

    `latents` were encoded before; `clips` are decoded and encoded while training. `workers` processes read (0 = a
    thread of the training process), each `ahead` batches ahead; one that is silent for `timeout_seconds` is given up.
    """

    source: Literal["latents", "clips"] = "latents"
    workers: Annotated[int, Field(ge=0)] = 0
    ahead: Positive = 2
    timeout_seconds: PositiveFloat = 600.0


class Survival(Section):
    """Seconds without a step after which a rank is taken to hang, and how often a stage is started again by itself."""

    hang_seconds: PositiveFloat = 1800.0
    retries: Annotated[int, Field(ge=0)] = 3


class Validation(Section):
    """A look at training every so many steps: loss on held-out clips at evenly spread times, and sampled videos.

    `prompts` are sampled in `sampling_steps` steps and shown as one contact sheet.
    """

    every: Positive
    clips: Positive
    timesteps: Positive
    prompts: tuple[str, ...] = ()
    sampling_steps: Positive = 10


class Lora(Section):
    """Low-rank adapters, trained in place of weights (arXiv 2106.09685); `targets` end the names of linear layers."""

    rank: Positive
    alpha: PositiveFloat
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    dropout: Fraction = 0.0


def memory_levers(engine: Engine, ranks: int) -> list[tuple[str, Engine]]:
    """What frees memory of a transformer's training on so many ranks and changes nothing that is learned.

    Words for the recipe's author and the engine that they make, the mildest first; what the section refuses is left
    out, and so is what is in use.
    """
    ways, blocks = list[tuple[str, dict[str, Any]]](), {"checkpoint_blocks": (100, 100), "recompute": "block"}
    full, shared = {"kind": "plain", "sharding": "full"}, ranks > engine.model_ranks
    if shared:
        ways.append(("sharding: full (kind: plain)", full))
        if engine.kind == "colossal" or engine.precision == "bf16":
            ways.append(("sharding: zero2 (kind: colossal)", {"kind": "colossal", "sharding": "zero2"}))
    ways.append(("checkpoint_blocks: [100, 100], recompute: block", blocks))
    ways.append(("checkpoint_blocks: [100, 100] with offload: true", {**blocks, "offload": True}))
    if shared:
        longer = (n for n in (2, 4, 8) if n > engine.sequence_parallel)
        ways += [(f"sequence_parallel: {n}", {"sequence_parallel": n}) for n in longer]
        ways.append(("sharding: full (kind: plain) with checkpoint_blocks: [100, 100]", {**full, **blocks}))
    found = [(words, _accepted(engine, over)) for words, over in ways]
    return [(words, new) for words, new in found if new and new != engine and ranks % new.model_ranks == 0]


def _accepted(engine: Engine, over: dict[str, Any]) -> Engine | None:
    """The engine with changes; None where the section refuses it."""
    with suppress(ValidationError):
        return Engine.model_validate({**engine.model_dump(), **over})
    return None


def engine_problems(engine: Engine, model: Model, lora: Lora | None) -> list[str]:
    """Why a network cannot be cut as an engine asks, one line each."""
    heads, found = model.num_heads, []
    windowed = isinstance(model, STDiT3) and model.kernel_size is not None
    by_heads = {"tensor_parallel": engine.tensor_parallel}
    if engine.sequence_mode == "ulysses" or windowed:
        by_heads["sequence_parallel"] = engine.sequence_parallel * engine.tensor_parallel
    for name, ranks in by_heads.items():
        if heads % ranks:
            ring = "; sequence_mode: ring needs no heads" if name == "sequence_parallel" and not windowed else ""
            found.append(f"engine.{name}: {heads} heads are not divisible by {ranks}{ring}")
    if lora is not None and engine.tensor_parallel > 1:
        found.append("engine.tensor_parallel: adapters are not cut over ranks: set it to 1, or train without lora")
    return found
