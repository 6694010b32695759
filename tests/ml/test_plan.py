"""The plan against the published runs, the bucketing rule as training applies it, and the FLOPs it is made of."""

import subprocess
import sys

import pytest

from ml.batching.buckets import Bucketing, Footage
from ml.counts import block_flops
from ml.plan import PlanError, parameters, plan, recomputed_fraction, step_shares
from ml.processes import AreaShift, RectifiedFlow, ScoreText
from ml.recipe import Recipe, available
from ml.sections import Bucket, Stage
from ml.shapes import Size

PAPER = Recipe.load("v2_0", "paper")
TINY = Recipe.load("v2_0", "tiny")
STAGES = [
    (Recipe.load(name, profile), stage.name)
    for name in available()
    for profile in ("paper", "tiny")
    for stage in Recipe.load(name, profile).stages
]


def with_buckets(recipe: Recipe, buckets: dict[str, dict[int, Bucket]]) -> Recipe:
    """A recipe of one stage with these buckets."""
    stage = recipe.stages[0].model_copy(update={"buckets": buckets})
    return recipe.model_copy(update={"stages": (stage,)})


@pytest.mark.parametrize(("frames", "visual", "tera"), [(1, 2304, 42.0), (65, 39168, 1618), (129, 76032, 5092)])
def test_a_bucket_costs_its_blocks(frames: int, visual: int, tera: float) -> None:
    bucket = {(b.resolution, b.frames): b for b in plan(PAPER).stages[2].buckets}["768px", frames]
    assert (bucket.visual_tokens, bucket.tokens) == (visual, visual + 512)
    assert bucket.forward_flops / 1e12 == pytest.approx(tera, rel=0.01)
    latents = (frames - 1) // 4 + 1
    assert bucket.forward_flops == block_flops(PAPER.network, (latents, 96, 96), 512)
    assert bucket.train_flops == 3 * bucket.forward_flops


def test_odd_grids_pay_for_the_row_that_fills_them_up() -> None:
    """360p 16:9 is 45 x 80 latents: 23 x 40 tokens for a network that pads; 51 frames are 15 latents of 1.2."""
    recipe = Recipe.load("v1_2", "paper")
    bucket = {(b.resolution, b.frames): b for b in plan(recipe).stages[0].buckets}["360p", 51]
    largest = max((s.area, s) for s in recipe_sizes(recipe, "360p"))[1]
    rows, columns = (-(-n // 8 // 2) for n in (largest.height, largest.width))
    assert bucket.visual_tokens == 15 * rows * columns


def test_stages_cost_what_was_published() -> None:
    """85k steps on 224 H200 took 2,240 GPU-days; utilisation 0.14 is what that run implies. Stage 3 checks the mix."""
    first, _, third = plan(PAPER).stages
    assert first.devices == 224
    assert first.gpu_hours / 24 == pytest.approx(2240, rel=0.15)
    assert third.gpu_hours / 24 == pytest.approx(1536, rel=0.15)
    assert plan(PAPER).usd == pytest.approx(199_600, rel=0.10)
    assert plan(PAPER).published_usd == 199_600


def test_hours_follow_from_flops_peak_and_utilisation() -> None:
    stage = plan(PAPER).stages[0]
    total = stage.steps * stage.flops_per_device_step * stage.devices
    assert stage.total_flops == pytest.approx(total)
    assert stage.gpu_hours == pytest.approx(total / (989e12 * 0.14) / 3600)
    assert stage.usd == pytest.approx(2.0 * stage.gpu_hours)
    assert stage.step_seconds * stage.steps * 224 / 3600 == pytest.approx(stage.gpu_hours)
    assert stage.gpu_hours_range.low < stage.gpu_hours < stage.gpu_hours_range.high
    assert plan(PAPER).usd_range.low < plan(PAPER).usd < plan(PAPER).usd_range.high


def test_sequence_parallelism_divides_the_work_of_a_device() -> None:
    """Batch 2 of the 768px 129-frame bucket over 4 ranks is 7.64 PF a device (the published stage 3)."""
    buckets = {(b.resolution, b.frames): b for b in plan(PAPER).stages[2].buckets}
    assert buckets["768px", 129].flops_per_device_step / 1e15 == pytest.approx(7.64, rel=0.01)
    assert buckets["768px", 65].flops_per_device_step / 1e15 == pytest.approx(4.85, rel=0.01)


def test_recomputation_is_executed_but_is_not_model_work() -> None:
    assert recomputed_fraction(PAPER.network, (8, 100)) == pytest.approx(46 / 57)
    assert recomputed_fraction(PAPER.network, (100, 100)) == 1
    stage = plan(PAPER).stages[0]
    assert stage.executed_flops_per_device_step == pytest.approx(stage.flops_per_device_step * (1 + 46 / 57 / 3))


def test_shares_of_steps_follow_the_bucketing_rule() -> None:
    """Tiny stage 3: half of the clips (18 to 47 frames) go to 96px, the rest to 64px by length; so do the images."""
    shares = step_shares(TINY, TINY.stages[2])
    long = len(range(33, 48)) / len(range(18, 48))
    videos = {("96px", 17): 0.5 / 4, ("64px", 33): 0.5 * long / 4, ("64px", 17): 0.5 * (1 - long) / 8}
    steps = videos | {("96px", 1): 0.5 / 8, ("64px", 1): 0.5 / 16}
    assert shares == pytest.approx({cell: count / sum(steps.values()) for cell, count in steps.items()})


@pytest.mark.parametrize(("recipe", "name"), STAGES, ids=lambda x: x if isinstance(x, str) else x.id)
def test_shares_sum_to_one(recipe: Recipe, name: str) -> None:
    stage = recipe.stage(name)
    shares = step_shares(recipe, stage)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(stage.buckets[resolution][frames].keep > 0 for resolution, frames in shares)


def test_a_refused_length_falls_to_the_next_resolution() -> None:
    """Keep 0 at the larger resolution: its clips train at the smaller one, at the same length."""
    full, refused = Bucket(keep=1.0, batch=1), Bucket(keep=0.0, batch=1)
    recipe = with_buckets(TINY, {"96px": {17: full, 33: refused}, "64px": {33: full}})
    long = len(range(33, 48)) / len(range(18, 48))
    wanted = {("96px", 17): 1 - long, ("64px", 33): long}
    assert step_shares(recipe, recipe.stages[0]) == pytest.approx(wanted)


def test_a_length_is_taken_with_its_probability_else_the_next_shorter() -> None:
    """A quarter of the long clips stay long; the others join the short ones, of which half are left to 64px."""
    rare, half = Bucket(keep=1.0, keep_length=0.25, batch=2), Bucket(keep=0.5, batch=1)
    recipe = with_buckets(TINY, {"96px": {17: half, 33: rare}, "64px": {17: Bucket(keep=1.0, batch=4)}})
    long = len(range(33, 48)) / len(range(18, 48))
    short = 1 - long + 0.75 * long
    steps = {("96px", 33): 0.25 * long / 2, ("96px", 17): short * 0.5, ("64px", 17): short * 0.5 / 4}
    wanted = {cell: count / sum(steps.values()) for cell, count in steps.items()}
    assert step_shares(recipe, recipe.stages[0]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "stage"), [("v1_0", "stage1"), ("v1_1", "stage3"), ("v1_2", "stage2"), ("v2_0", "stage1")]
)
def test_shares_are_those_of_training(name: str, stage: str) -> None:
    """Clips of every length go through the trainer's own bucketing; the expected shares are met within sampling."""
    recipe = Recipe.load(name, "paper")
    found = trained_shares(recipe, recipe.stage(stage), 6000)
    expected = step_shares(recipe, recipe.stage(stage))
    assert set(found) <= set(expected)
    assert all(found.get(cell, 0.0) == pytest.approx(share, abs=0.02) for cell, share in expected.items())


def test_plans_of_all_generations_meet_what_was_published() -> None:
    """Each utilisation is fitted on a recipe's whole; GPU-days agree within 2 %, and no stage is off by a half."""
    for name, days in (("v1_0", 197), ("v1_1", 548), ("v1_2", 1458), ("v1_3", 1458), ("v2_0", 4160)):
        planned = plan(Recipe.load(name, "paper"))
        assert planned.gpu_hours / 24 == pytest.approx(days, rel=0.02)
        assert planned.warnings == planned.unreached, "nothing but buckets for footage of another kind"
        assert planned.published_gpu_days in (None, days)


def test_parameters_are_those_of_the_resolved_network() -> None:
    assert parameters(PAPER) == 11_891_390_528
    assert parameters(Recipe.load("v1_0", "paper")) == 759_620_768


def test_a_plan_above_the_budget_warns() -> None:
    poor = PAPER.model_copy(update={"budget_usd": 1000.0})
    assert any("budget_usd" in line for line in plan(poor).warnings)
    assert not any("budget_usd" in line for line in plan(PAPER.model_copy(update={"budget_usd": 1e6})).warnings)


def test_buckets_that_no_curated_clip_falls_in_are_named() -> None:
    """Too short, too long, too large; a length with keep 0 is not missed, nor one below a resolution that keeps all."""
    on, off = Bucket(keep=1.0, batch=1), Bucket(keep=0.0, batch=1)
    recipe = with_buckets(TINY, {"64px": {1: on, 5: on, 9: on, 17: on, 33: on, 49: on, 53: off}, "1024px": {1: on}})
    (line,) = plan(recipe).warnings
    assert line.startswith("stage1: no clip of curation.clips (1.5 to 4 s at 12 fps, 240 px)")
    assert line.endswith("(frames): 64px 5 to 9, 49; 1024px 1")
    slow = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"fps_max": 4.0})})
    assert "at 4 fps" in plan(slow).warnings[0]
    assert "64px 17 to 49;" in plan(slow).warnings[0]


def test_the_longest_lengths_of_1_2_have_footage() -> None:
    """408 frames are 13.6 s of its clips of 2 to 16 s at 30 frames per second."""
    for profile in ("paper", "tiny"):
        assert "408" not in "".join(plan(Recipe.load("v1_2", profile)).unreached)
    assert ("144p", 408) in step_shares(Recipe.load("v1_2", "paper"), Recipe.load("v1_2", "paper").stages[0])


@pytest.mark.parametrize("name", available())
def test_the_smallest_profile_uses_every_bucket(name: str) -> None:
    assert plan(Recipe.load(name, "tiny")).warnings == ()


def test_autoencoders_train_as_published() -> None:
    """docs/vae.md 1.2, cfg/vae_v1_3/train and cfg/vae/train of main; the rest of the recipe is that of `paper`."""
    phases = {name: Recipe.load(name, "vae").autoencoder.stages for name in ("v1_2", "v1_3", "v2_0_hc")}
    assert [(s.part, s.steps, s.frames, s.random_frames, s.compute.devices) for s in phases["v1_2"]] == [
        ("temporal", 380_000, 17, False, 8),
        ("temporal", 260_000, 17, False, 8),
        ("all", 540_000, 34, True, 24),
    ]
    assert {(s.optimizer.lr, s.batch, s.image_fraction, s.loss.kl) for s in phases["v1_2"]} == {(1e-5, 1, 0.2, 1e-6)}
    assert [(s.loss.latent, s.loss.identity, s.loss.perceptual) for s in phases["v1_2"]] == [
        (1.0, 1.0, 0.0),
        (1.0, 0.0, 0.0),
        (0.0, 0.0, 0.1),
    ]
    (third,) = phases["v1_3"]
    assert third.loss.adversarial is not None
    assert (third.loss.perceptual, third.loss.adversarial.weight, third.loss.adversarial.start_step) == (1.0, 0.5, 0)
    plain, against = phases["v2_0_hc"]
    assert plain.loss.adversarial is None
    assert against.loss.adversarial is not None
    assert (against.loss.adversarial.weight, against.loss.adversarial.layers, against.frames) == (0.05, 5, 32)
    assert (plain.optimizer.betas, plain.ema_decay, plain.loss.perceptual) == ((0.9, 0.98), 0.99, 0.5)
    for name in phases:
        ours, paper = Recipe.load(name, "vae"), Recipe.load(name, "paper")
        assert (ours.stages, ours.sampling, ours.model) == (paper.stages, paper.sampling, paper.model)
        assert (ours.autoencoder.weights_uri is None) == (name != "v1_2"), "1.2 needs a per-frame half to stand on"


@pytest.mark.parametrize("name", ["v1_2", "v1_3"])
def test_the_smallest_profiles_shift_times_by_their_own_size(name: str) -> None:
    objective = Recipe.load(name, "tiny").objective
    assert isinstance(objective, RectifiedFlow)
    assert isinstance(objective.shift, AreaShift)
    assert objective.shift.base_area == 64 * 64
    assert Recipe.load(name, "tiny").sampling.score == ScoreText()


def test_an_unknown_accelerator_cannot_be_planned() -> None:
    compute = TINY.stages[0].compute.model_copy(update={"accelerators": "TPU:8"})
    stage = TINY.stages[0].model_copy(update={"compute": compute})
    with pytest.raises(PlanError, match="TPU"):
        plan(TINY.model_copy(update={"stages": (stage,)}))


def test_clips_too_short_for_any_bucket_cannot_be_planned() -> None:
    clips = TINY.curation.clips.model_copy(update={"min_seconds": 0.1, "max_seconds": 0.5})
    stage = TINY.stages[0].model_copy(update={"buckets": {"64px": {17: TINY.stages[0].buckets["64px"][17]}}})
    curation = TINY.curation.model_copy(update={"clips": clips})
    with pytest.raises(PlanError, match=r"fewer\s+frames"):
        plan(TINY.model_copy(update={"curation": curation, "stages": (stage,)}))


def test_planning_loads_no_torch() -> None:
    code = "import sys, ml.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stage_that_refuses_every_clip_cannot_be_planned() -> None:
    nothing = with_buckets(TINY, {"64px": {17: Bucket(keep=0.0, batch=1)}})
    with pytest.raises(PlanError, match="keep above 0"):
        plan(nothing)


def recipe_sizes(recipe: Recipe, resolution: str) -> list[Size]:
    from ml.shapes import sizes_of

    return list(sizes_of(resolution, recipe.strides.pixels).values())


def trained_shares(recipe: Recipe, stage: Stage, count: int) -> dict[tuple[str, int], float]:
    """Shares of steps when clips spread evenly over the curated lengths, each huge, are bucketed for training."""
    clips, fps = recipe.curation.clips, recipe.curation.clips.fps
    rule = Bucketing(recipe.strides.pixels, recipe.dataset.fps_max, seed=0)
    low, high = clips.min_seconds * fps, clips.max_seconds * fps
    steps: dict[tuple[str, int], float] = {}
    for index in range(count):
        frames = int(low + (high - low) * (index + 0.5) / count)
        for cell in rule.cells(Footage(f"clip{index}", Size(8000, 8000), frames, fps), stage.buckets):
            key = (cell.resolution, cell.frames)
            steps[key] = steps.get(key, 0.0) + 1 / stage.buckets[key[0]][key[1]].batch
    return {key: value / sum(steps.values()) for key, value in steps.items()}
