"""How noise is added, what is learned of it, and how samples are made: a recipe's `objective` and `sampling`.

Torch-free, so that recipes can be read and checked anywhere; ml/diffusion builds the mathematics from these classes.
Numbers are the released ones (os/iddpm 1.0 and 1.1, os/rf 1.2 and 1.3, scripts/diffusion/train.py main).
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ml.architectures import Conditioning, MMDiT, Model
from ml.section import Fraction, Positive, PositiveFloat, Section

# --- conditions ---------------------------------------------------------------------------------------------------

# Kinds of given frames that a network of each conditioning is trained with; `t2v` is nothing given, everywhere
# (`identity` in 1.1 and 1.2, `none` in 1.3). `intepolate` is the released spelling.
KINDS: Mapping[Conditioning, tuple[str, ...]] = {
    "none": ("t2v",),
    "mask": (
        "t2v",
        "random",
        "intepolate",
        "quarter_random",
        "quarter_head",
        "quarter_tail",
        "quarter_head_tail",
        "image_random",
        "image_head",
        "image_tail",
        "image_head_tail",
    ),
    "embed": (
        "t2v",
        "i2v_head",
        "i2v_tail",
        "i2v_loop",
        "v2v_head",
        "v2v_head_noisy",
        "v2v_tail",
        "other",
    ),
    "channels": (
        "t2v",
        "i2v_head",
        "i2v_tail",
        "i2v_loop",
        "v2v_head",
        "v2v_tail",
        "v2v_head_easy",
        "v2v_tail_easy",
    ),
}
# Kinds that a sampling section may name: `mask` takes references and edit ratios from a mask strategy.
SAMPLED_KINDS: Mapping[Conditioning, tuple[str, ...]] = {
    "none": ("t2v",),
    "mask": ("t2v", "mask"),
    "embed": ("t2v", "mask", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail"),
    "channels": KINDS["channels"],
}
SampledKind = Literal[
    "t2v", "mask", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"
]

# --- objectives ---------------------------------------------------------------------------------------------------


class IDDPM(Section):
    """Denoising diffusion of 1.0 and 1.1: linear betas, noise is predicted, the variance's range is learned.

    A dropped text (`drop_context`, 0.1 as released) is the network's own null caption.
    """

    kind: Literal["iddpm"] = "iddpm"
    num_timesteps: Positive = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    learn_sigma: bool = True
    drop_context: Fraction = 0.1
    drop_pooled: Fraction = 0.0


class LinearShift(Section):
    """Timestep shift of 2.0: alpha is linear in latent tokens per frame, times sqrt(latent frames) for video."""

    kind: Literal["linear"] = "linear"
    min_tokens: Positive = 256
    max_tokens: Positive = 4096
    min_alpha: PositiveFloat = 1.0
    max_alpha: PositiveFloat = 3.0
    temporal: bool = True


class AreaShift(Section):
    """Timestep shift of 1.2 and 1.3: sqrt(pixels / base_area) sqrt(n) scale, where n counts latents of the clip.

    n is 1 for images, or when `temporal` is off; `v1_2`: floor(frames / 17) 5, `v1_3`: floor((frames - 1) / 4). In 1.3
    `scale` is left out for images.
    """

    kind: Literal["area"] = "area"
    law: Literal["v1_2", "v1_3"]
    base_area: Positive = 512 * 512
    scale: PositiveFloat = 1.0
    temporal: bool = True


Shift = Annotated[LinearShift | AreaShift, Field(discriminator="kind")]


class DropGiven(Section):
    """What is dropped of a sample that is given frames (1.3): nothing, its text, its frames, or both; sums to 1."""

    nothing: Fraction = 0.85
    text: Fraction = 0.05
    given: Fraction = 0.05
    both: Fraction = 0.05

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.nothing + self.text + self.given + self.both
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"drop_given sums to {total:g}: its four probabilities must sum to 1")
        return self


class Augmentation(Section):
    """Damage done to the input of a training sample whose target stays whole (1.3): chances, and how strong.

    Noise on pixels has a strength uniform in 0..pixel_noise; a factor of downsampling is drawn from its list.
    """

    pixel_noise_chance: Fraction = 0.5
    pixel_noise: Fraction = 0.4
    spatial_chance: Fraction = 0.2
    spatial_factors: Annotated[tuple[Literal[1, 2, 4, 8], ...], Field(min_length=1)] = (2, 4, 4, 8, 8, 8, 8)
    temporal_chance: Fraction = 0.2
    temporal_factors: Annotated[tuple[Literal[1, 2, 4, 8], ...], Field(min_length=1)] = (2, 4, 8)


class RectifiedFlow(Section):
    """Straight lines between data and noise; `law` is the generation whose conventions the network was trained with.

    1.2 and 1.3: x_t = (1-t) x0 + t x1, the network gives x0 - x1 (first half of its channels) and gets 1000 t. 2.0:
    x_t = (1-t) x0 + (1-(1-sigma_min)(1-t)) x1, the network gives (1-sigma_min) x1 - x0 and gets t. Training times are
    sigmoid(normal(logit_mean, logit_std)), shifted. Fields from `drop_given` on are of 1.3.
    """

    kind: Literal["rectified_flow"] = "rectified_flow"
    law: Literal["v1_2", "v1_3", "v2_0"]
    sigma_min: Annotated[float, Field(ge=0, lt=1)] = 0.0
    logit_mean: float = 0.0
    logit_std: PositiveFloat = 1.0
    shift: Shift
    drop_context: Fraction
    drop_pooled: Fraction = 0.0
    uniform_over: Fraction | None = None
    drop_given: DropGiven | None = None
    x_cond_weight: Annotated[float, Field(ge=0)] = 1.0
    condition_noise: tuple[Fraction, Fraction] = (0.1, 0.3)
    augmentation: Augmentation | None = None

    @model_validator(mode="after")
    def _is_of_one_generation(self) -> Self:
        wanted = "linear" if self.law == "v2_0" else "area"
        if self.shift.kind != wanted:
            raise ValueError(f"law {self.law} has a shift of kind {wanted!r}, not {self.shift.kind!r}")
        if self.law != "v2_0" and self.sigma_min:
            raise ValueError(f"sigma_min is of law v2_0; {self.law} ends at the data: set it to 0")
        if self.condition_noise[0] > self.condition_noise[1]:
            raise ValueError(f"condition_noise runs from low to high, got {self.condition_noise}")
        later = [n for n in ("uniform_over", "drop_given", "augmentation") if getattr(self, n) is not None]
        if self.law != "v1_3" and later:
            raise ValueError(f"{', '.join(later)}: only law v1_3 has this, not {self.law}")
        return self


Objective = Annotated[IDDPM | RectifiedFlow, Field(discriminator="kind")]

# --- sampling -----------------------------------------------------------------------------------------------------


class ScoreText(Section):
    """Words added to a prompt, as each generation writes them (ml/score_text.py); None adds nothing.

    1.2: numbers. 1.3: words, or numbers that are put into bins. 2.0: `motion` as a whole number, 4 as released, after
    the frame rate.
    """

    style: Literal["none", "v1_2", "v1_3", "v2_0"] = "none"
    aesthetic: float | str | None = None
    motion: float | str | None = None
    camera: str | None = None

    @model_validator(mode="after")
    def _fits_the_style(self) -> Self:
        named = [name for name in ("aesthetic", "motion", "camera") if getattr(self, name) is not None]
        if self.style == "none" and named:
            raise ValueError(f"{', '.join(named)} is set but style is none: say which generation's words to use")
        if self.style == "v2_0" and set(named) - {"motion"}:
            raise ValueError("2.0 writes the frame rate and the motion score only: leave aesthetic and camera out")
        words = [n for n in ("aesthetic", "motion") if isinstance(getattr(self, n), str)]
        if self.style != "v1_3" and words:
            raise ValueError(f"{', '.join(words)} must be a number: only 1.3 writes scores as words")
        return self


class Sampling(Section):
    """How samples are made: solver, steps, guidance, what is given, size, frames, frame rate.

    `guided_channels` (3 of 4 in 1.0 and 1.1) leaves the other channels at their conditional value; None guides all.
    `oscillate` takes text and image guidance to 1 on odd steps after the tenth. `ramp` lets image guidance rise along
    the clip to a top that falls to 1 over the steps. `flaw_fix` pulls the guided output's spread towards the
    conditional one's. `sdedit` starts each step from noised references. `flow_shift` replaces the shift (1 = none).
    `loops` clips continue each other by `loop_latents` given latent frames; `align` rounds references' places.
    """

    solver: Literal["euler", "ddpm", "dpm_solver"] = "euler"
    steps: Positive
    guidance_text: PositiveFloat
    guidance_image: PositiveFloat = 1.0
    guided_channels: Positive | None = None
    oscillate: bool = False
    ramp: bool = False
    flaw_fix: bool = False
    sdedit: bool = False
    flow_shift: PositiveFloat | None = None
    negative_prompt: str = ""
    resolution: str
    aspect: str
    frames: Positive
    fps: PositiveFloat
    condition: SampledKind = "t2v"
    loops: Positive = 1
    loop_latents: Annotated[int, Field(ge=0)] = 5
    align: Positive | None = None
    score: ScoreText = ScoreText()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.solver == "dpm_solver" and self.guided_channels is not None:
            raise ValueError("dpm_solver guides all channels, as 1.0 and 1.1 did: leave guided_channels out")
        if self.solver == "dpm_solver" and self.steps < 2:
            raise ValueError("dpm_solver is of second order: it needs 2 steps at least")
        if self.solver == "dpm_solver" and self.condition != "t2v":
            raise ValueError("dpm_solver takes no given frames: sample with ddpm, or set condition t2v")
        if self.solver != "euler":
            flow = [name for name in ("flow_shift", "flaw_fix", "sdedit", "ramp") if getattr(self, name)]
            if flow:
                raise ValueError(f"{', '.join(flow)}: of rectified flow, which the {self.solver} solver does not solve")
        return self


def check_solver(objective: IDDPM | RectifiedFlow, sampling: Sampling) -> None:
    """Raise ValueError when the solver is of another process than the objective."""
    solvers = ("ddpm", "dpm_solver") if isinstance(objective, IDDPM) else ("euler",)
    if sampling.solver not in solvers:
        raise ValueError(f"solver {sampling.solver!r} does not solve {objective.kind}: use {' or '.join(solvers)}")


# Sampling settings that only 1.3 and 2.0 have.
LATER_SETTINGS = ("ramp", "flaw_fix", "sdedit")


def network_problems(objective: IDDPM | RectifiedFlow, model: Model) -> list[str]:
    """Why a network cannot learn an objective: times in another unit, no channels for the variance, nothing shown."""
    if isinstance(objective, RectifiedFlow):
        if isinstance(model, MMDiT) == (objective.law == "v2_0"):
            return []
        right = "v2_0" if isinstance(model, MMDiT) else "v1_2 or v1_3"
        return [f"objective.law: {objective.law} tells the network times that {model.kind} does not know; use {right}"]
    problems = []
    if model.conditioning in ("embed", "channels"):
        problems.append(f"objective: iddpm shows no given latents, which {model.kind} takes; use rectified_flow")
    elif isinstance(model, MMDiT):
        problems.append("objective: mmdit knows times of rectified_flow law v2_0 only")
    has = not isinstance(model, MMDiT) and model.pred_sigma
    if objective.learn_sigma and not has:
        problems.append(
            f"objective.learn_sigma: {model.kind} gives no variance; set it to false, or pred_sigma to true"
        )
    if has and not objective.learn_sigma:
        problems.append("model.pred_sigma: gives a variance that learn_sigma false does not use; set both alike")
    return problems


def sampling_problems(objective: IDDPM | RectifiedFlow, model: Model, sampling: Sampling) -> list[str]:
    """Settings of sampling that the generation does not have, or that could not be followed."""
    problems = []
    if isinstance(objective, IDDPM) and sampling.steps > objective.num_timesteps:
        problems.append(f"sampling.steps: {sampling.steps} of the {objective.num_timesteps} that are trained")
    if isinstance(objective, IDDPM) or objective.law == "v1_2":
        idle = [name for name in LATER_SETTINGS if getattr(sampling, name)]
        idle += ["guidance_image"] if sampling.guidance_image != 1.0 else []
        if idle:
            problems.append(f"sampling: {', '.join(idle)} of 1.3 and 2.0, without effect for {model.kind}; leave out")
    if sampling.loops > 1 and model.conditioning != "mask" and sampling.condition != "mask":
        why = "its network is told by kind" if model.conditioning != "none" else "it makes whole clips only"
        problems.append(f"sampling.loops: {model.kind} makes 1, not {sampling.loops}, as {why}")
    return problems
