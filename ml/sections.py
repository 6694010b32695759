"""The sections of a recipe, in data-flow order: every key that a recipe may hold, with its unit and its bounds.

Everything is frozen and refuses unknown keys. A section says what is wanted; `ml/recipe.py` checks that sections agree.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ml.architectures import AutoencoderNet, Latent, Source
from ml.methods import Engine, Guard, Loading, Lora, Survival, Validation
from ml.reconstruction import AutoencoderLoss
from ml.section import Fraction, Name, Positive, PositiveFloat, Section
from ml.shapes import Law


class Range(Section):
    """Closed interval; a missing end is open."""

    min: float | None = None
    max: float | None = None


class Compute(Section):
    """Where a task runs: `accelerators` as SkyPilot writes them (`CPU:2`, `H200:8`), nodes, and the price-book row.

    `processes` is how many a training starts on each node; None is one for every GPU, and one on a CPU.
    """

    accelerators: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9-]*:\d+$")]
    nodes: Positive
    price: str
    infra: str | None = None
    use_spot: bool = False
    processes: Positive | None = None

    @property
    def devices(self) -> int:
        """Accelerators (or cores, for `CPU:n`) over all nodes."""
        return int(self.accelerators.split(":")[1]) * self.nodes

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator is asked for."""
        return self.accelerators.startswith("CPU:")

    @property
    def ranks(self) -> int:
        """Processes of a training over all nodes: `processes` a node, else one a GPU, and one on a CPU."""
        each = 1 if self.on_cpu else int(self.accelerators.split(":")[1])
        return (self.processes or each) * self.nodes


# --- data ---------------------------------------------------------------------------------------------------------


class Corpus(Section):
    """Which corpora enter, and under which licences."""

    names: Annotated[tuple[Name, ...], Field(min_length=1)]
    licences: Annotated[tuple[str, ...], Field(min_length=1)]


class Shots(Section):
    """Shot detection: PySceneDetect's adaptive (ratio) or content (HSV difference) detector."""

    detector: Literal["adaptive", "content"]
    threshold: PositiveFloat
    min_seconds: PositiveFloat


class Clips(Section):
    """How shots are cut: clip length in seconds, frame rate cap, shorter side in pixels, x264 quality."""

    min_seconds: PositiveFloat
    max_seconds: PositiveFloat
    fps: PositiveFloat
    short_side_px: Positive
    crf: Annotated[int, Field(ge=0, le=51)]


class Keep(Section):
    """Thresholds: a clip stays when every score lies in its range; near-duplicates within `dedup_bits` are dropped."""

    thresholds: dict[str, Range]
    dedup_bits: Annotated[int, Field(ge=0, le=64)]


class Captions(Section):
    """Who captions, and which captions are acceptable (length in words)."""

    captioner: Literal["measured"]
    min_words: Positive
    max_words: Positive


class Curation(Section):
    """From corpus to captioned clips."""

    shots: Shots
    clips: Clips
    scores: Annotated[tuple[Name, ...], Field(min_length=1)]
    keep: Keep
    captions: Captions


class Tier(Section):
    """A subset of the curated clips that one or more stages train on: thresholds on top of `curation.keep`."""

    name: Name
    thresholds: dict[str, Range]


class Dataset(Section):
    """The frozen dataset: held-out share, tiers, and the frame rate that clips are trained at.

    Whole shots are held out: a long video gives one unbroken block of them, any other goes whole to one side. Clips are
    thinned by a whole interval to at most `fps_max` frames per second.
    """

    fps_max: PositiveFloat
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)]


# --- encoders -----------------------------------------------------------------------------------------------------


class Text(Section):
    """Text encoder, its token length and the sizes of what it gives.

    `t5` is T5 v1.1 XXL (1.0 to 1.3, nothing pooled), `t5_clip` that and CLIP-L pooled (2.0), `minilm` the packaged
    all-MiniLM-L6-v2, which fits a laptop.
    """

    kind: Literal["t5", "t5_clip", "minilm"]
    max_tokens: Positive
    context_dim: Positive
    pooled_dim: Annotated[int, Field(ge=0)]


class Adam(Section):
    """AdamW, with a linear warm-up of `warmup_steps`, and what its rate does after that.

    `constant` stays; `cosine`, `linear` and `polynomial` (with `power`) fall to the floor at the last step;
    `inverse_sqrt` falls as 1 / sqrt(step); `wsd` stays, then falls over the last `decay_share` of all steps. The floor
    is `min_factor` times `lr`. (The originals: constant after a warm-up, and cosine in 1.3; ou/optimizer.py, main.)
    """

    lr: PositiveFloat
    eps: PositiveFloat
    betas: tuple[Fraction, Fraction]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd", "polynomial"] = "constant"
    min_factor: Fraction = 0.0
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None
    power: PositiveFloat | None = None

    @model_validator(mode="after")
    def _asked(self) -> Self:
        """Each law takes its own numbers and no others."""
        if self.schedule == "constant" and self.min_factor:
            raise ValueError("schedule constant never falls: leave min_factor out, or choose a law that does")
        for name, law in (("decay_share", "wsd"), ("power", "polynomial")):
            if (getattr(self, name) is not None) != (self.schedule == law):
                state = "needs" if self.schedule == law else "takes no"
                raise ValueError(f"schedule {self.schedule} {state} {name}, which is of {law}")
        return self


# What a phase costs, how often it saves and looks, and how work is spread over ranks changes nothing that is learned.
NOT_LEARNED: dict[str, Any] = {
    **dict.fromkeys(
        ("compute", "published", "utilisation", "checkpoint_every", "keep_checkpoints", "validation", "survival"), True
    ),
    "loading": {"workers", "ahead", "timeout_seconds"},
    "engine": set(Engine.model_fields) - {"precision", "grad_clip", "accumulate", "batches_per_step", "fp8"},
}


class Phase(Section):
    """What every training phase has, of the transformer or the autoencoder."""

    name: Name
    tier: Name
    steps: Positive
    optimizer: Adam
    ema_decay: Fraction | None
    checkpoint_every: Positive
    keep_checkpoints: Positive
    engine: Engine
    guard: Guard = Guard()
    loading: Loading = Loading()
    survival: Survival = Survival()
    compute: Compute

    @property
    def learned(self) -> dict[str, Any]:
        """Everything that decides what is learned: another value makes another checkpoint."""
        return self.model_dump(mode="json", exclude=NOT_LEARNED)

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that take different batches."""
        return max(1, self.compute.ranks // self.engine.model_ranks)


class AutoencoderStage(Phase):
    """One training phase of the autoencoder.

    `part` is what is trained: all of it, or one half of a two-stage network while the other stands still. A batch is
    images with probability `image_fraction`; clips have `frames` frames, or any length up to it that can be encoded
    where `random_frames` is set.
    """

    part: Literal["all", "spatial", "temporal"] = "all"
    resolution: str
    frames: Positive
    random_frames: bool = False
    image_fraction: Fraction
    batch: Positive
    ema_decay: Fraction | None = None
    keep_checkpoints: Positive = 2
    loss: AutoencoderLoss
    engine: Engine = Engine(
        kind="plain", precision="fp32", grad_clip=1.0, accumulate=1, sequence_parallel=1, checkpoint_blocks=(0, 0)
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """It is trained whole, or cut by tensor_parallel, and without the levers of the transformers' blocks.

        The adversary weighs itself by gradients of the last layer, which a sharded network does not keep. Blocks of
        an autoencoder cannot be made again, have few linear layers, and not all of them compile (torch 2.13 fails on
        2.0's convolutions of padded time).
        """
        if self.engine.sharding != "none" or self.engine.model_ranks > self.engine.tensor_parallel:
            raise ValueError(
                f"{self.name}: an autoencoder is trained whole or cut by tensor_parallel: set engine.sharding to none, "
                "sequence_parallel and pipeline_parallel to 1"
            )
        engine = self.engine
        levers = {"checkpoint_blocks": engine.checkpoint_blocks != (0, 0), "compile": engine.compile, "fp8": engine.fp8}
        if asked := [name for name, pulled in levers.items() if pulled]:
            raise ValueError(
                f"{self.name}: engine.{' and engine.'.join(asked)} work on blocks of transformers only: leave them out "
                "of an autoencoder's engine"
            )
        return self


# (law of time, pixels along one side of a latent cell) of every kind of autoencoder.
GEOMETRY: dict[str, tuple[Law, int]] = {
    "sd": ("frame", 8),
    "opensora_v1_2": ("micro", 8),
    "opensora_v1_3": ("window", 8),
    "hunyuan": ("causal", 8),
    "dc_ae": ("group", 32),
}


class Autoencoder(Section):
    """The autoencoder: its network, how its latents are normalised, and where its weights come from.

    A `latent` of None is measured after training; weights that are only loaded (`weights_uri`, no stages) need it
    given.
    """

    net: AutoencoderNet
    latent: Latent | None
    weights_uri: str | None
    stages: tuple[AutoencoderStage, ...]

    @property
    def kind(self) -> str:
        """Kind of network."""
        return self.net.kind

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.net.latent_channels

    @property
    def law(self) -> Law:
        """How it shortens time."""
        return GEOMETRY[self.kind][0]

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent cell."""
        return GEOMETRY[self.kind][1]


# --- where training starts ----------------------------------------------------------------------------------------


class Pretrained(Section):
    """Released transformer weights that the first stage starts from: a path in the workspace, and their layout.

    Without any stage they are sampled and judged as they are. `source` is one of `opensora weights import --source`:
    `auto` finds out. `licence` (an SPDX identifier) and `url` are recorded with the import.
    """

    uri: str
    source: Source = "auto"
    licence: str = ""
    url: str = ""


# --- stages -------------------------------------------------------------------------------------------------------


class Bucket(Section):
    """One (resolution, frames) cell: probabilities and batch size.

    A clip long enough takes this length with `keep_length`, else a shorter one; then it stays at this resolution with
    `keep`, else it falls to the next lower one. (The second number of 1.2 and 1.3's tables is `keep_length`; that of
    2.0 is its opposite, the probability to skip: od/bucket.py, 1.2 and main.)
    """

    keep: Fraction
    keep_length: Fraction = 1.0
    batch: Positive


class Published(Section):
    """What the original reported for this stage, to stand beside our plan."""

    gpu_days: PositiveFloat
    usd: PositiveFloat
    source: str


class Stage(Phase):
    """One training phase of the transformer, on the checkpoint of the phase before.

    `conditions` are the kinds of given frames and their weights, by the names of the generation
    (`ml.processes.KINDS`).
    """

    buckets: dict[str, dict[int, Bucket]]
    conditions: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    lora: Lora | None = None
    validation: Validation | None = None
    utilisation: Fraction
    published: Published | None = None


# --- judgement ----------------------------------------------------------------------------------------------------


class Rule(Section):
    """One line of the gate: `metric` must be at least / at most a number, or a share of a baseline metric."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    relative_to: str | None = None


class Evaluation(Section):
    """Prompt set, seeds, dimensions, held-out loss grid, re-evaluation schedule, gate."""

    prompts: Name
    num_prompts: Positive
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    vbench_dimensions: Annotated[tuple[str, ...], Field(min_length=1)]
    loss_timesteps: Positive
    loss_clips: Positive
    cron: str
    gate: Annotated[tuple[Rule, ...], Field(min_length=1)]


class ComputeByStep(Section):
    """Hardware of every step that is not a training stage."""

    curate: Compute
    encode: Compute
    sample: Compute
    evaluate: Compute
