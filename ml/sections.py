"""The sections of a recipe, in data-flow order: every key that a recipe may hold, with its unit and its bounds.

Everything is frozen and refuses unknown keys. A section says what is wanted; `ml/recipe.py` checks that sections agree.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Section(BaseModel):
    """Base of every section: frozen, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(Section):
    """Closed interval; a missing end is open."""

    min: float | None = None
    max: float | None = None


class Compute(Section):
    """Where a task runs: `accelerators` as SkyPilot writes them (`CPU:2`, `H200:8`), nodes, and the price-book row."""

    accelerators: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9-]*:\d+$")]
    nodes: Positive
    price: str
    infra: str | None = None
    use_spot: bool = False

    @property
    def devices(self) -> int:
        """Accelerators (or cores, for `CPU:n`) over all nodes."""
        return int(self.accelerators.split(":")[1]) * self.nodes


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
    """The frozen dataset: held-out share and tiers.

    Whole shots are held out: a long video gives one unbroken block of them, any other goes whole to one side.
    """

    holdout_fraction: Annotated[float, Field(gt=0, lt=1)]
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1)]


# --- encoders -----------------------------------------------------------------------------------------------------


class Text(Section):
    """Text encoder: `t5_clip` is T5 v1.1 XXL plus CLIP-L pooled (2.0); `minilm` is the packaged all-MiniLM-L6-v2."""

    kind: Literal["t5_clip", "minilm"]
    max_tokens: Positive
    context_dim: Positive
    pooled_dim: Positive


class Adam(Section):
    """AdamW, with a linear warm-up of `warmup_steps`."""

    lr: PositiveFloat
    eps: PositiveFloat
    betas: tuple[Fraction, Fraction]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_steps: Annotated[int, Field(ge=0)]


class AutoencoderLoss(Section):
    """Weights of the reconstruction (L1), perceptual (LPIPS) and KL terms."""

    reconstruction: PositiveFloat
    perceptual: Annotated[float, Field(ge=0)]
    kl: Annotated[float, Field(ge=0)]


class AutoencoderStage(Section):
    """One training phase of the autoencoder."""

    name: Name
    tier: Name
    steps: Positive
    resolution: str
    frames: Positive
    image_fraction: Fraction
    batch: Positive
    optimizer: Adam
    loss: AutoencoderLoss
    checkpoint_every: Positive
    compute: Compute


class Autoencoder(Section):
    """Causal video autoencoder of the HunyuanVideo kind; `scale` multiplies latents.

    A `scale` of None is measured after training; weights that are only loaded (`weights_uri`, no stages) need it given.
    """

    kind: Literal["hunyuan"]
    channels: Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)]
    layers_per_block: Positive
    norm_groups: Positive
    latent_channels: Positive
    temporal_stride: Literal[4]
    spatial_stride: Literal[8]
    scale: PositiveFloat | None
    weights_uri: str | None
    stages: tuple[AutoencoderStage, ...]


# --- model, objective, stages -------------------------------------------------------------------------------------


class MMDiT(Section):
    """Multi-modal diffusion transformer of 2.0 (11.89B parameters at the published size)."""

    kind: Literal["mmdit"]
    width: Positive
    heads: Positive
    double_blocks: Positive
    single_blocks: Positive
    mlp_ratio: PositiveFloat
    rope_axes: tuple[Positive, Positive, Positive]
    rope_theta: PositiveFloat
    patch: Positive
    guidance_embed: bool
    condition_embed: bool


class Shift(Section):
    """Timestep shift: alpha is linear in latent tokens per frame, times sqrt(latent frames) for video."""

    min_tokens: Positive
    max_tokens: Positive
    min_alpha: PositiveFloat
    max_alpha: PositiveFloat
    temporal: bool


class RectifiedFlow(Section):
    """Flow matching of 2.0: x_t = (1-t) x0 + (1-(1-sigma)(1-t)) x1, logit-normal t, shifted; text dropout."""

    kind: Literal["rectified_flow"]
    sigma_min: Annotated[float, Field(ge=0, lt=1)]
    logit_mean: float
    logit_std: PositiveFloat
    shift: Shift
    drop_context: Fraction
    drop_pooled: Fraction


class Bucket(Section):
    """Keep probability and batch size of one (resolution, frames) cell."""

    keep: Fraction
    batch: Positive


class Engine(Section):
    """How training is distributed and in which precision; `plain` drives one device and no sequence parallelism."""

    kind: Literal["plain"]
    precision: Literal["fp32", "bf16"]
    grad_clip: PositiveFloat
    accumulate: Positive
    sequence_parallel: Positive
    checkpoint_blocks: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Published(Section):
    """What the original reported for this stage, to stand beside our plan."""

    gpu_days: PositiveFloat
    usd: PositiveFloat
    source: str


class Stage(Section):
    """One training phase of the transformer, on the checkpoint of the phase before."""

    name: Name
    tier: Name
    steps: Positive
    buckets: dict[str, dict[int, Bucket]]
    conditions: dict[Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail"], Positive]
    optimizer: Adam
    ema_decay: Fraction | None
    checkpoint_every: Positive
    keep_checkpoints: Positive
    engine: Engine
    utilisation: Fraction
    compute: Compute
    published: Published | None = None


# --- judgement ----------------------------------------------------------------------------------------------------


class Sampling(Section):
    """How samples are made: Euler steps, guidance scales, size, frames, frame rate."""

    steps: Positive
    guidance_text: PositiveFloat
    guidance_image: PositiveFloat
    oscillate: bool
    resolution: str
    aspect: str
    frames: Positive
    fps: PositiveFloat


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
