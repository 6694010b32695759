"""What a recipe will cost, before anything is spent: tokens, FLOPs, GPU-hours and dollars of every transformer stage.

Letters: h width, r MLP ratio, S tokens of one sample (visual and text), P sequence-parallel size.

The plan counts the matrix products of the transformer's blocks, which are all but 0.2 % of its work, in the forward
pass and twice that in the backward pass ("model FLOPs", what utilisation is measured on). Recomputing checkpointed
blocks and encoding are extra work that a stage's `utilisation` has to absorb; the recomputed share is listed as
executed FLOPs. It is the headline bill: one successful path, no failed run, no data, no autoencoder, no evaluation.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from infra.prices import price
from ml import sections
from ml.recipe import Recipe
from ml.shapes import Size, nominal_area, sizes_of

# Dense bf16 peak of one accelerator (vendor data sheets of H100 SXM, H800, H200), in TFLOP/s.
PEAK_TFLOPS = {
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    # One core, float32: two 256-bit fused multiply-adds a cycle at 3 GHz. An assumption, good to a factor of two.
    "CPU": 0.1,
}

# A backward pass costs two forward passes: one product for the input's gradient, one for the weight's.
TRAIN_FACTOR = 3.0

# (resolution, frames) of a bucket.
Cell = tuple[str, int]

ASSUMPTION = (
    "Mean over buckets: clip lengths are taken to be spread evenly over curation.clips (seconds, at sampling.fps), "
    "every clip large enough for every resolution, and bucketed by the training rule (largest resolution first, kept "
    "with the bucket's probability; once as video, once as image). The range is the cheapest and the dearest bucket."
)

SECONDS_PER_HOUR = 3600.0


class PlanError(ValueError):
    """A stage that cannot be planned: no peak speed is known for its accelerator."""


@dataclass(frozen=True)
class BucketPlan:
    """One (resolution, frames) cell: tokens and FLOPs of a sample, FLOPs of one step on one device."""

    resolution: str
    frames: int
    batch: int
    share: float
    visual_tokens: int
    tokens: int
    forward_flops: float
    train_flops: float
    flops_per_device_step: float
    executed_flops_per_device_step: float


@dataclass(frozen=True)
class Interval:
    """Cheapest and dearest bucket, had the whole stage trained on it."""

    low: float
    high: float


@dataclass(frozen=True)
class StagePlan:
    """One stage: its buckets, hardware and price. Hours and dollars are of the mean over buckets (see ASSUMPTION)."""

    name: str
    steps: int
    accelerator: str
    devices: int
    utilisation: float
    peak_flops: float
    usd_per_device_hour: float
    buckets: tuple[BucketPlan, ...]
    published: sections.Published | None

    @property
    def tokens(self) -> float:
        """Tokens of a sample (visual and text), mean over buckets."""
        return self._mean("tokens")

    @property
    def flops_per_device_step(self) -> float:
        """Model FLOPs of one optimizer step on one device, mean over buckets."""
        return self._mean("flops_per_device_step")

    @property
    def executed_flops_per_device_step(self) -> float:
        """The same with recomputed blocks."""
        return self._mean("executed_flops_per_device_step")

    @property
    def total_flops(self) -> float:
        """Model FLOPs of the whole stage."""
        return self.flops_per_device_step * self.steps * self.devices

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step at the stage's utilisation."""
        return self.flops_per_device_step / (self.peak_flops * self.utilisation)

    @property
    def gpu_hours(self) -> float:
        """Device-hours billed (core-hours on a CPU)."""
        return self._hours(self.flops_per_device_step)

    @property
    def gpu_hours_range(self) -> Interval:
        """Device-hours if every step were of the cheapest, and of the dearest bucket."""
        flops = [bucket.flops_per_device_step for bucket in self.buckets]
        return Interval(self._hours(min(flops)), self._hours(max(flops)))

    @property
    def usd(self) -> float:
        """Dollars of `gpu_hours`."""
        return self.gpu_hours * self.usd_per_device_hour

    @property
    def usd_range(self) -> Interval:
        """Dollars of `gpu_hours_range`."""
        hours = self.gpu_hours_range
        return Interval(hours.low * self.usd_per_device_hour, hours.high * self.usd_per_device_hour)

    def _hours(self, flops_per_device_step: float) -> float:
        seconds = self.steps * flops_per_device_step / (self.peak_flops * self.utilisation)
        return seconds * self.devices / SECONDS_PER_HOUR

    def _mean(self, field: str) -> float:
        return sum(bucket.share * float(getattr(bucket, field)) for bucket in self.buckets)


@dataclass(frozen=True)
class Plan:
    """The whole recipe: its stages, the totals, and what does not add up."""

    recipe: str
    budget_usd: float
    parameters: int
    stages: tuple[StagePlan, ...]
    assumption: str = ASSUMPTION

    @property
    def gpu_hours(self) -> float:
        """Device-hours of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def usd(self) -> float:
        """Dollars of all stages."""
        return sum(stage.usd for stage in self.stages)

    @property
    def usd_range(self) -> Interval:
        """Dollars between the cheapest and the dearest buckets throughout."""
        ranges = [stage.usd_range for stage in self.stages]
        return Interval(sum(r.low for r in ranges), sum(r.high for r in ranges))

    @property
    def published_usd(self) -> float | None:
        """Dollars that the original reported for the same stages; None unless every stage has a published figure."""
        figures = [stage.published.usd for stage in self.stages if stage.published]
        return sum(figures) if len(figures) == len(self.stages) else None

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to think again before spending, one sentence each."""
        found = []
        if self.usd > self.budget_usd:
            found.append(f"{self.recipe}: the plan is ${self.usd:,.0f}, above budget_usd ${self.budget_usd:,.0f}")
        for stage in self.stages:
            if stage.published and not 0.5 <= stage.gpu_hours / 24 / stage.published.gpu_days <= 2:
                days, reported = stage.gpu_hours / 24, stage.published.gpu_days
                found.append(f"{stage.name}: {days:,.0f} GPU-days planned, {reported:,.0f} published")
        return tuple(found)


def plan(recipe: Recipe) -> Plan:
    """Predict every stage of a recipe; raises PlanError for an accelerator whose peak speed is unknown."""
    stages = tuple(_stage(recipe, stage) for stage in recipe.stages)
    return Plan(recipe.id, recipe.budget_usd, parameters(recipe), stages)


def parameters(recipe: Recipe) -> int:
    """Parameters of the transformer, counted in closed form (11,891,390,528 at the published size)."""
    model, text = recipe.model, recipe.text
    h, hidden, cell = model.width, int(model.width * model.mlp_ratio), model.patch**2
    channels = recipe.autoencoder.latent_channels * cell
    norms = 2 * (h // model.heads)
    stream = _linear(h, 6 * h) + 4 * _linear(h, h) + norms + _linear(h, hidden) + _linear(hidden, h)
    single = 2 * _linear(h, h) + _linear(h, h + hidden) + _linear(h + hidden, h) + norms + _linear(h, 3 * h)
    embedders = [256, text.pooled_dim] + ([256] if model.guidance_embed else [])
    ends = sum(_linear(size, h) + _linear(h, h) for size in embedders)
    ends += _linear(channels, h) + _linear(text.context_dim, h) + _linear(h, 2 * h) + _linear(h, channels)
    ends += _linear(channels + cell, h) if model.condition_embed else 0
    return model.double_blocks * 2 * stream + model.single_blocks * single + ends


def forward_flops(model: sections.MMDiT, tokens: int) -> float:
    """FLOPs of one forward pass over one sample: blocks x ((8 + 4r) h^2 S + 4 S^2 h); r = 4 gives 24 h^2 S.

    A double block holds twice a single block's weights, and each token passes one of its two streams.
    """
    h, blocks = model.width, model.double_blocks + model.single_blocks
    return blocks * ((8 + 4 * model.mlp_ratio) * h**2 * tokens + 4.0 * tokens**2 * h)


def recomputed_fraction(model: sections.MMDiT, checkpoint_blocks: tuple[int, int]) -> float:
    """Share of the forward pass that backward repeats: (8, 100) of 19 and 38 blocks is 46/57."""
    double, single = checkpoint_blocks
    done = min(double, model.double_blocks) + min(single, model.single_blocks)
    return done / (model.double_blocks + model.single_blocks)


def step_shares(recipe: Recipe, stage: sections.Stage) -> dict[Cell, float]:
    """Share of a stage's steps that each (resolution, frames) takes, under ASSUMPTION; shares sum to 1."""
    examples: dict[Cell, float] = {}
    for frames, chance in _lengths(recipe, stage).items():
        left = chance
        for resolution in sorted(stage.buckets, key=nominal_area, reverse=True):
            fitting = [count for count in stage.buckets[resolution] if _is_longest(count, frames)]
            if not fitting:
                continue
            cell = (resolution, max(fitting))
            taken = left * stage.buckets[resolution][cell[1]].keep
            examples[cell] = examples.get(cell, 0.0) + taken
            left -= taken
    steps = {cell: count / stage.buckets[cell[0]][cell[1]].batch for cell, count in examples.items() if count > 0}
    return {cell: count / sum(steps.values()) for cell, count in steps.items()}


def _lengths(recipe: Recipe, stage: sections.Stage) -> dict[int, float]:
    """Chance that a clip has at least so many frames and fewer than the next bucket asks for; 1 frame: every clip."""
    clips, fps = recipe.curation.clips, recipe.sampling.fps
    shortest, longest = clips.min_seconds * fps, clips.max_seconds * fps
    counts = sorted({frames for cells in stage.buckets.values() for frames in cells if frames > 1})
    chances = {1: 1.0}
    for frames, following in zip(counts, [*counts[1:], math.inf], strict=True):
        overlap = min(following, longest) - max(frames, shortest)
        chances[frames] = max(0.0, overlap / (longest - shortest)) if longest > shortest else float(overlap >= 0)
    return chances


def _is_longest(count: int, frames: int) -> bool:
    """Whether a bucket of `count` frames may hold a clip of `frames`: images only images, videos anything shorter."""
    return count == 1 if frames == 1 else 1 < count <= frames


def _stage(recipe: Recipe, stage: sections.Stage) -> StagePlan:
    accelerator = stage.compute.accelerators.split(":")[0]
    if accelerator not in PEAK_TFLOPS:
        raise PlanError(
            f"{stage.name}: no peak speed known for {accelerator!r}; known: {', '.join(PEAK_TFLOPS)} "
            "(add its data sheet's dense bf16 figure to ml/plan.py)"
        )
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        accelerator=accelerator,
        devices=stage.compute.devices,
        utilisation=stage.utilisation,
        peak_flops=PEAK_TFLOPS[accelerator] * 1e12,
        usd_per_device_hour=price(stage.compute.price).usd_per_hour,
        buckets=tuple(_buckets(recipe, stage)),
        published=stage.published,
    )


def _buckets(recipe: Recipe, stage: sections.Stage) -> list[BucketPlan]:
    shares = step_shares(recipe, stage)
    if not shares:
        raise PlanError(f"{stage.name}: no clip of curation.clips falls in any bucket; add a bucket of fewer frames")
    return [_bucket(recipe, stage, cell, share) for cell, share in shares.items()]


def _bucket(recipe: Recipe, stage: sections.Stage, cell: Cell, share: float) -> BucketPlan:
    resolution, frames = cell
    bucket = stage.buckets[resolution][frames]
    visual = recipe.strides.tokens(_nominal(recipe, resolution), frames)
    tokens = visual + recipe.text.max_tokens
    forward = forward_flops(recipe.model, tokens)
    samples = bucket.batch * stage.engine.accumulate / stage.engine.sequence_parallel
    recomputed = forward * recomputed_fraction(recipe.model, stage.engine.checkpoint_blocks)
    return BucketPlan(
        resolution=resolution,
        frames=frames,
        batch=bucket.batch,
        share=share,
        visual_tokens=visual,
        tokens=tokens,
        forward_flops=forward,
        train_flops=TRAIN_FACTOR * forward,
        flops_per_device_step=samples * TRAIN_FACTOR * forward,
        executed_flops_per_device_step=samples * (TRAIN_FACTOR * forward + recomputed),
    )


def _nominal(recipe: Recipe, resolution: str) -> Size:
    """The largest shape of a resolution (the square one for `<N>px`); the others lose a few tokens to rounding."""
    return max(sizes_of(resolution, recipe.strides.pixels).values(), key=lambda size: size.area)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
