"""How a stage is trained: the engine that distributes it, where batches come from, and what is done when it goes wrong.

Sections of a recipe, as those of `ml/sections.py`: frozen, refusing unknown keys, each with its unit and its bounds.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ml.architectures import Model, STDiT3
from ml.section import Fraction, Positive, PositiveFloat, Section


class Engine(Section):
    """How training is distributed, in which precision, and what is traded for memory.

    `plain` is torch alone: one device, or under torchrun data parallel, `sharding: none` as DDP, `full` as FSDP2.
    `colossal` is ColossalAI's Booster: `none`, `zero1`, `zero2`; `pipeline_parallel` above 1 is experimental. Ranks are
    cut into data x sequence x tensor (x pipeline). `checkpoint_blocks` says how many blocks of each kind keep no
    activations: `recompute: block` makes all of them again, `selective` keeps what matrix products and attention gave;
    `offload` keeps what is kept of them on the host. `compile` compiles block by block; `fp8` computes the blocks'
    linear layers in 8 bits.
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

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Each kind shards its own way."""
        allowed = {"plain": ("none", "full"), "colossal": ("none", "zero1", "zero2")}[self.kind]
        if self.sharding not in allowed:
            raise ValueError(f"engine {self.kind} takes sharding {' or '.join(allowed)}, not {self.sharding}")
        if self.kind == "plain" and self.pipeline_parallel > 1:
            raise ValueError("engine plain has no pipeline: set pipeline_parallel to 1, or kind to colossal")
        return self

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

    `samples` prompts of the evaluation's set are sampled in `sampling_steps` steps and shown as one contact sheet.
    """

    every: Positive
    clips: Positive
    timesteps: Positive
    samples: Annotated[int, Field(ge=0)] = 0
    sampling_steps: Positive = 10


class Lora(Section):
    """Low-rank adapters, trained in place of weights (arXiv 2106.09685); `targets` end the names of linear layers."""

    rank: Positive
    alpha: PositiveFloat
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    dropout: Fraction = 0.0


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
