"""What a recipe will cost, before anything is spent: tokens, FLOPs, GPU-hours and dollars of every transformer stage.

The plan counts the products of the transformer's blocks (ml/counts.py) in the forward pass, and twice that in the
backward pass ("model FLOPs", what utilisation is measured on). Recomputing checkpointed blocks and encoding are extra
work that a stage's `utilisation` has to absorb; the recomputed share is listed as executed FLOPs. It is the headline
bill: one successful path, no failed run, no data, no autoencoder, no evaluation.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from infra.prices import price
from ml import counts, sections
from ml.counts import forward_flops, recomputed_fraction
from ml.recipe import Recipe
from ml.shapes import MIN_AREA, Size, frame_interval, nominal_area, sizes_of

__all__ = [
    "PEAK_TFLOPS",
    "BucketPlan",
    "Cell",
    "Interval",
    "Plan",
    "PlanError",
    "StagePlan",
    "forward_flops",
    "parameters",
    "plan",
    "recomputed_fraction",
    "step_shares",
]

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
    "Mean over buckets: clip lengths are taken to be spread evenly over curation.clips (seconds, thinned to "
    "dataset.fps_max), every clip large enough for every resolution, and bucketed by the training rule (largest "
    "resolution first, in it the longest length, both with the bucket's probabilities; once as video, once as image). "
    "The range is the cheapest and the dearest bucket."
)

SECONDS_PER_HOUR = 3600.0


class PlanError(ValueError):
    """A stage that cannot be planned: no peak speed is known for its accelerator, or no clip falls in its buckets."""


@dataclass(frozen=True)
class BucketPlan:
    """One (resolution, frames) cell: tokens and FLOPs (of the blocks) of a sample, FLOPs of one step on one device."""

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
    unreached: tuple[str, ...]
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
        return sum(figures) if figures and len(figures) == len(self.stages) else None

    @property
    def published_gpu_days(self) -> float | None:
        """GPU-days likewise."""
        figures = [stage.published.gpu_days for stage in self.stages if stage.published]
        return sum(figures) if figures and len(figures) == len(self.stages) else None

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
        return (*found, *self.unreached)


def plan(recipe: Recipe) -> Plan:
    """Predict every stage of a recipe; raises PlanError for an accelerator whose peak speed is unknown."""
    stages = tuple(_stage(recipe, stage) for stage in recipe.stages)
    unreached = tuple(line for stage in recipe.stages for line in _unreached(recipe, stage))
    return Plan(recipe.id, recipe.budget_usd, parameters(recipe), stages, unreached)


def parameters(recipe: Recipe) -> int:
    """Learned parameters of the transformer, counted in closed form (11,891,390,528 at the published size of 2.0)."""
    return counts.parameters(recipe.network)


def step_shares(recipe: Recipe, stage: sections.Stage) -> dict[Cell, float]:
    """Share of a stage's steps that each (resolution, frames) takes, under ASSUMPTION; shares sum to 1."""
    examples: dict[Cell, float] = {}
    for frames, chance in _lengths(recipe, stage).items():
        left = chance
        for resolution in sorted(stage.buckets, key=nominal_area, reverse=True):
            for cell, share in _taken(stage, resolution, frames).items():
                examples[cell] = examples.get(cell, 0.0) + left * share
            left *= 1.0 - sum(_taken(stage, resolution, frames).values())
    steps = {cell: count / stage.buckets[cell[0]][cell[1]].batch for cell, count in examples.items() if count > 0}
    return {cell: count / sum(steps.values()) for cell, count in steps.items()}


def _unreached(recipe: Recipe, stage: sections.Stage) -> list[str]:
    """The stage's buckets that would keep a clip, but that none of `curation.clips` falls in: one line, or none.

    Clips may be smaller than `short_side_px`: a resolution that lies above takes none away.
    """
    clips, lengths = recipe.curation.clips, [t for t, chance in _lengths(recipe, stage).items() if chance > 0]
    missed = []
    for resolution, cells in stage.buckets.items():
        large = _largest_area(recipe, resolution) >= MIN_AREA * nominal_area(resolution)
        taken = [_taken(stage, resolution, frames) for frames in lengths if large]
        reached = {frames for shares in taken for (_, frames), share in shares.items() if share > 0}
        wanted = sorted(frames for frames, bucket in cells.items() if bucket.keep > 0)
        runs = [list(run) for hit, run in groupby(wanted, reached.__contains__) if not hit]
        missed += [f"{resolution} {', '.join(_ends(run) for run in runs)}"] if runs else []
    if not missed:
        return []
    kind = f"{clips.min_seconds:g} to {clips.max_seconds:g} s at {_rate(recipe):g} fps, {clips.short_side_px} px"
    return [f"{stage.name}: no clip of curation.clips ({kind}) falls in these buckets (frames): {'; '.join(missed)}"]


def _ends(run: list[int]) -> str:
    return f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0])


def _largest_area(recipe: Recipe, resolution: str) -> float:
    """Pixels of a curated clip of the widest aspect ratio that a resolution lists."""
    sizes = sizes_of(resolution, recipe.strides.pixels).values()
    return recipe.curation.clips.short_side_px**2 * max(max(s.width / s.height, s.height / s.width) for s in sizes)


def _rate(recipe: Recipe) -> float:
    """Frames per second that curated clips are trained at."""
    fps = recipe.curation.clips.fps
    return fps / frame_interval(fps, recipe.dataset.fps_max)


def _lengths(recipe: Recipe, stage: sections.Stage) -> dict[int, float]:
    """Chance that a clip has at least so many frames and fewer than the next bucket asks for; 1 frame: every clip."""
    clips, fps = recipe.curation.clips, _rate(recipe)
    shortest, longest = clips.min_seconds * fps, clips.max_seconds * fps
    counts = sorted({frames for cells in stage.buckets.values() for frames in cells if frames > 1})
    chances = {1: 1.0}
    for frames, following in zip(counts, [*counts[1:], math.inf], strict=True):
        overlap = min(following, longest) - max(frames, shortest)
        chances[frames] = max(0.0, overlap / (longest - shortest)) if longest > shortest else float(overlap >= 0)
    return chances


def _taken(stage: sections.Stage, resolution: str, frames: int) -> dict[Cell, float]:
    """Share of the clips of `frames` frames that each length of a resolution takes; images are of their own length 1.

    A clip takes its longest length with `keep_length`, else the next shorter; then it stays here with `keep`.
    """
    cells, shares, left = stage.buckets[resolution], {}, 1.0
    for count in sorted((n for n in cells if (n == 1 if frames == 1 else 1 < n <= frames)), reverse=True):
        accepted = left * (1.0 if count == 1 else cells[count].keep_length)
        shares[resolution, count] = accepted * cells[count].keep
        left -= accepted
    return shares


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
        raise PlanError(
            f"{stage.name}: no clip of curation.clips falls in any bucket that keeps clips; add a bucket of fewer "
            "frames, or a keep above 0"
        )
    return [_bucket(recipe, stage, cell, share) for cell, share in shares.items()]


def _bucket(recipe: Recipe, stage: sections.Stage, cell: Cell, share: float) -> BucketPlan:
    resolution, frames = cell
    bucket, size, text = stage.buckets[resolution][frames], _nominal(recipe, resolution), recipe.text.max_tokens
    visual = recipe.strides.tokens(size, frames)
    forward = float(counts.block_flops(recipe.network, recipe.strides.grid(size, frames), text))
    batches = stage.engine.micro_batches(stage.data_ranks) * stage.data_ranks
    samples = bucket.batch * batches / stage.compute.devices
    recomputed = forward * recomputed_fraction(recipe.network, stage.engine.checkpoint_blocks)
    return BucketPlan(
        resolution=resolution,
        frames=frames,
        batch=bucket.batch,
        share=share,
        visual_tokens=visual,
        tokens=visual + text,
        forward_flops=forward,
        train_flops=TRAIN_FACTOR * forward,
        flops_per_device_step=samples * TRAIN_FACTOR * forward,
        executed_flops_per_device_step=samples * (TRAIN_FACTOR * forward + recomputed),
    )


def _nominal(recipe: Recipe, resolution: str) -> Size:
    """The largest shape of a resolution (the square one for `<N>px`); the others lose a few tokens to rounding."""
    return max(sizes_of(resolution, recipe.strides.pixels).values(), key=lambda size: size.area)
