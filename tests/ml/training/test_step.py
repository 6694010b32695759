import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml import processes
from ml.batching.buckets import Cell
from ml.batching.datasets import LatentBatch, LatentDataset
from ml.counts import block_flops
from ml.diffusion.draws import Conditioner
from ml.diffusion.process import build_process
from ml.engines.plain import PlainEngine
from ml.models.inputs import Inputs, Text
from ml.recipe import Recipe
from ml.sections import Adam
from ml.shapes import Size
from ml.training.networks import new_transformer
from ml.training.objective import denoising
from ml.training.optim import adamw, schedule, step_generator
from ml.training.step import Denoising, Dropping, Geometry, Loss, Objective, inputs_of, shape_of, take_step

ADAM = Adam(lr=0.1, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
CPU = torch.device("cpu")
MASKED = {"t2v": 0.5, "image_head": 0.5}


class Recorder(nn.Module):
    """A network that says 0 in as many channels as asked, and remembers what it was told."""

    null_context = None

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))
        self.factor = factor
        self.asked: list[tuple[Tensor, Tensor, Inputs]] = []

    def forward(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        self.asked.append((x, t, inputs))
        return torch.cat([x * 0] * self.factor, 1) + self.zero

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        return {"x": x, "t": t, "inputs": inputs}

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        return output


class Squares(Objective[Tensor]):
    """A batch is a tensor of numbers; the loss is the mean squared distance of the weight from them."""

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        value = (engine.model.weight.flatten() - data).square().mean()
        return Loss(value, len(data), 2 * len(data), {"largest": float(data.max())})


def engine(model: nn.Module, adam: Adam = ADAM) -> PlainEngine:
    made = PlainEngine(CPU, torch.float32, 1e9)
    made.setup(model, adamw(adam), schedule(adam, 1000))
    return made


def empty(recipe: Recipe) -> Text:
    """A text like no other: -5 as context, -7 pooled, one real token."""
    section = recipe.text
    mask = torch.arange(section.max_tokens)[None] < 1
    context = torch.full((1, section.max_tokens, section.context_dim), -5.0)
    return Text(context, torch.full((1, section.pooled_dim), -7.0), mask)


def objective(
    recipe: Recipe, kinds: dict[str, float], network: Any, keeps_mask: bool = False, **over: Any
) -> Denoising:
    section = recipe.objective.model_copy(update=over)
    dropping = Dropping(section.drop_context, section.drop_pooled, empty(recipe), keeps_mask)
    conditioner = Conditioner(recipe.model.conditioning, kinds, section)
    return Denoising(build_process(section), network, conditioner, dropping, Geometry(recipe.strides, recipe.network))


def batch(recipe: Recipe, number: int, frames: int) -> LatentBatch:
    """Clips of so many frames; three of four text tokens are real, ends are 8 and 9."""
    generator = torch.Generator().manual_seed(0)
    channels, text = recipe.autoencoder.latent_channels, recipe.text
    latents = torch.randn(number, channels, recipe.strides.latent_frames(frames), 6, 10, generator=generator)
    ends = [torch.full((number, channels, 1, 6, 10), value) if frames > 1 else None for value in (8.0, 9.0)]
    mask = (torch.arange(text.max_tokens) < 3).expand(number, -1)
    embedded = Text(torch.ones(number, text.max_tokens, text.context_dim), torch.ones(number, text.pooled_dim), mask)
    return LatentBatch(latents, embedded, torch.linspace(8, 24, number), Cell("48x80", frames, Size(48, 80)), *ends)


def test_micro_batches_of_equal_size_are_one_large_batch() -> None:
    data, generator = torch.arange(8.0), step_generator(CPU, 0)
    one, two = (engine(nn.Linear(1, 1, bias=False)) for _ in range(2))
    with torch.no_grad():
        one.model.weight.fill_(2.0)
        two.model.weight.fill_(2.0)
    whole = take_step(one, Squares(), [data], [generator])
    parts = take_step(two, Squares(), [data[:4], data[4:]], [generator] * 2)
    assert (whole.loss, whole.grad_norm, whole.examples) == (parts.loss, parts.grad_norm, parts.examples)
    # d/dw mean (w - x)^2 = 2 (2 - 3.5) = -3.
    assert whole.grad_norm == pytest.approx(3.0)
    assert (whole.loss, whole.examples, whole.tokens) == (float((2 - data).square().mean()), 8, 16)
    assert torch.equal(one.model.weight, two.model.weight)
    assert (whole.terms, parts.terms) == ({"largest": 7.0}, {"largest": (3.0 + 7.0) / 2})


def test_a_loss_that_is_not_finite_makes_no_update_and_the_schedule_goes_on() -> None:
    made = engine(nn.Linear(1, 1, bias=False))
    before = made.model.weight.detach().clone()
    found = take_step(made, Squares(), [torch.tensor([1.0, math.nan])], [step_generator(CPU, 0)], lambda: True)
    assert not found.updated
    assert found.asked
    assert torch.equal(made.model.weight, before)
    assert take_step(made, Squares(), [torch.tensor([1.0])], [step_generator(CPU, 0)]).updated


def test_a_silent_network_has_the_loss_of_the_velocity_itself(mini: Recipe) -> None:
    """Velocity (1 - s) noise - data, both of variance 1: the mean square is about 2; tokens are 2 x 3 x 5 a clip."""
    made = engine(Recorder())
    loss = objective(mini, {"t2v": 1}, made.model, drop_context=0.0).loss(
        made, batch(mini, 64, 5), step_generator(CPU, 1)
    )
    assert float(loss.value.detach()) == pytest.approx(2.0, rel=0.05)
    assert (loss.examples, loss.tokens) == (64, 64 * 30)
    # 5 frames are 2 latent ones of 6 x 10; forward once and backward twice.
    assert loss.flops == 64 * 3 * block_flops(mini.network, (2, 6, 10), mini.text.max_tokens)
    assert made.model.asked[0][2].condition is None


def test_what_the_network_sees_lies_on_the_line_between_data_and_noise(mini: Recipe) -> None:
    """At time t it sees data and noise of variance (1-t)^2 + t^2 (sigma_min is 1e-5)."""
    made, data = engine(Recorder()), batch(mini, 256, 5)
    objective(mini, {"t2v": 1}, made.model).loss(made, data, step_generator(CPU, 1))
    x, t, _ = made.model.asked[0]
    variance = x.flatten(1).var(1)
    assert bool(((t > 0) & (t < 1)).all())
    torch.testing.assert_close(variance, (1 - t) ** 2 + t**2, rtol=0.4, atol=0.0)
    assert float((variance / ((1 - t) ** 2 + t**2)).mean()) == pytest.approx(1, abs=0.02)


def test_each_encoder_is_dropped_by_itself_and_replaced_by_the_empty_prompt(mini: Recipe) -> None:
    made = engine(Recorder())
    step = objective(mini, {"t2v": 1}, made.model, drop_context=0.3, drop_pooled=0.6)
    step.loss(made, batch(mini, 4000, 5), step_generator(CPU, 3))
    text = made.model.asked[0][2].text
    no_context, no_pooled = text.context[:, 0, 0] == -5, text.pooled[:, 0] == -7
    assert bool((text.context.flatten(1) == text.context[:, :1, 0]).all())
    # Binomials of 4000: +- 0.008.
    assert float(no_context.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(no_pooled.float().mean()) == pytest.approx(0.6, abs=0.03)
    assert float((no_context & no_pooled).float().mean()) == pytest.approx(0.18, abs=0.03)
    # An encoded empty prompt brings its own mask, of one token.
    assert torch.equal(text.mask.sum(1), torch.where(no_context, 1, 3))


def test_a_networks_own_null_caption_borrows_the_mask_of_the_prompt(mini: Recipe) -> None:
    """1.x repeats the prompt's mask for its null caption (as it does at sampling time)."""
    dropping = Dropping(0.5, 0.0, empty(mini), keeps_mask=True)
    text = batch(mini, 400, 5).text
    found = dropping.apply(text, step_generator(CPU, 4))
    dropped = found.context[:, 0, 0] == -5
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert torch.equal(found.mask, text.mask)


def test_a_sample_that_loses_its_text_with_its_frames_always_does(mini: Recipe) -> None:
    always = torch.arange(6) % 2 == 0
    found = Dropping(0.0, 0.0, empty(mini), keeps_mask=False).apply(
        batch(mini, 6, 5).text, step_generator(CPU, 0), always
    )
    assert torch.equal(found.context[:, 0, 0] == -5, always)
    assert torch.equal(found.pooled[:, 0] == -7, always)
    assert found.mask.sum(1).tolist() == [1, 3, 1, 3, 1, 3]
    assert torch.equal(found.context[1], torch.ones_like(found.context[1]))


def test_conditions_come_by_weight_and_give_ends_as_pictures(mini: Recipe) -> None:
    made, data = engine(Recorder()), batch(mini, 3000, frames=9)
    step = objective(mini, {"t2v": 1, "i2v_head": 2, "i2v_tail": 1}, made.model)
    step.loss(made, data, step_generator(CPU, 3))
    condition = made.model.asked[0][2].condition
    masks = [tuple(row) for row in condition[:, 0, :, 0, 0].int().tolist()]
    shares = {kind: masks.count(kind) / len(masks) for kind in set(masks)}
    assert shares.keys() == {(0, 0, 0), (1, 0, 0), (0, 0, 1)}
    assert shares[1, 0, 0] == pytest.approx(0.5, abs=0.04)
    tails = condition[[mask == (0, 0, 1) for mask in masks]]
    assert bool((tails[:, 1:, -1] == 9).all())
    heads = condition[[mask == (1, 0, 0) for mask in masks]]
    assert bool((heads[:, 1:, 0] == 8).all())
    assert not heads[:, 1:, 1:].any()


def test_an_image_batch_is_given_nothing_to_copy(mini: Recipe) -> None:
    made = engine(Recorder())
    objective(mini, {"i2v_head": 1}, made.model).loss(made, batch(mini, 4, frames=1), step_generator(CPU, 0))
    assert float(made.model.asked[0][2].condition.abs().sum()) == 0


def test_the_network_is_told_what_the_batch_was(mini: Recipe) -> None:
    """Pixels and frames before encoding, and each clip's own frame rate; shifts see the same."""
    data = batch(mini, 3, 5)
    made = engine(Recorder())
    objective(mini, {"t2v": 1}, made.model).loss(made, data, step_generator(CPU, 0))
    inputs = made.model.asked[0][2]
    assert (inputs.height, inputs.width, inputs.frames) == (48, 80, 5)
    assert torch.equal(inputs.fps, data.fps)
    shape = shape_of(data, mini.strides)
    assert (shape.frames, shape.height, shape.width, shape.latent_frames, shape.tokens_per_frame) == (5, 48, 80, 2, 15)
    again = inputs_of(data, data.text, made_draw(), made)
    assert again.condition is again.active is None
    assert again.given == ()


def made_draw() -> Any:
    from ml.diffusion.draws import Draw

    return Draw()


# --- generations with masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v1_1", "v1_2"])
def test_given_frames_stand_clean_in_the_input_and_are_told(make_generation: Callable[..., Recipe], name: str) -> None:
    """1.2 leaves them as they are; 1.1 takes them at step 0, where a trace of noise is left (beta 1e-4)."""
    recipe = make_generation(name)
    made, data = engine(Recorder(2)), batch(recipe, 40, 8)
    objective(recipe, MASKED, made.model).loss(made, data, step_generator(CPU, 2))
    x, _, inputs = made.model.asked[0]
    assert inputs.active is not None
    given = ~inputs.active
    assert not given[:, 1:].any()
    assert 10 < int(given[:, 0].sum()) < 30
    clean, noisy = x[given[:, 0], :, 0], x[~given[:, 0], :, 0]
    kept = data.latents[given[:, 0], :, 0]
    assert float((clean - kept).abs().max()) < (1e-9 if name == "v1_2" else 0.06)
    assert float((noisy - data.latents[~given[:, 0], :, 0]).abs().mean()) > 0.1


class Wrong(Recorder):
    """Says `self.zero` everywhere, and 1000 in the first frame."""

    def forward(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        output = super().forward(x, t, inputs)
        first = torch.zeros_like(output)
        first[:, :, 0] = 1000.0
        return output + first


def test_given_frames_are_left_out_of_the_loss(make_generation: Callable[..., Recipe]) -> None:
    """What the network says of a given frame costs nothing and teaches nothing; of the same frame made, it does."""
    recipe = make_generation("v1_2")
    data = batch(recipe, 16, 8)
    losses = {}
    for kind in ("image_head", "image_tail"):
        made = engine(Wrong(2))
        loss = objective(recipe, {kind: 1.0}, made.model).loss(made, data, step_generator(CPU, 2))
        losses[kind] = float(loss.value.detach())
        loss.value.backward()
        gradient = float(made.model.zero.grad.abs())
        assert gradient < 10 if kind == "image_head" else gradient > 100
    assert losses["image_head"] == pytest.approx(2.0, rel=0.1)
    assert losses["image_tail"] > 1e5


def test_masked_iddpm_leaves_given_frames_out_of_its_bound_too(make_generation: Callable[..., Recipe]) -> None:
    recipe = make_generation("v1_1")
    assert isinstance(recipe.objective, processes.IDDPM)
    assert recipe.objective.learn_sigma
    data, losses = batch(recipe, 16, 4), []
    for model in (Wrong(2), Recorder(2)):
        made = engine(model)
        step = objective(recipe, {"image_head": 1.0}, made.model)
        losses.append(float(step.loss(made, data, step_generator(CPU, 2)).value.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_given_latent_of_1_3_is_told_beside_the_noise_with_its_place(make_generation: Callable[..., Recipe]) -> None:
    recipe = make_generation("v1_3")
    made, data = engine(Recorder(2)), batch(recipe, 200, 5)
    step = objective(recipe, {"i2v_head": 1.0}, made.model, drop_context=0.0)
    step.loss(made, data, step_generator(CPU, 2))
    x, t, inputs = made.model.asked[0]
    assert (inputs.given, inputs.active) == ((0,), None)
    assert inputs.condition is not None
    assert inputs.condition[:, 0, :, 0, 0].tolist() == [[1.0, 0.0]] * 200
    shown = inputs.condition[:, 1:, 0].flatten(1).abs().sum(1) > 0
    # 85 % keep both; the frames go in 5 + 5 %, the text in 5 + 5 %: binomials of 200, +- 0.02.
    assert float(shown.float().mean()) == pytest.approx(0.9, abs=0.06)
    assert float((inputs.text.context[:, 0, 0] == -5).float().mean()) == pytest.approx(0.1, abs=0.06)
    assert bool((t >= 0).all() and (t <= 1000).all())
    assert float(t.max()) > 10, "1.3's networks count to 1000"
    assert float((x[:, :, 0] - data.latents[:, :, 0]).abs().mean()) > 0.1, "the given frame is noised all the same"


def test_a_damaged_copy_is_seen_and_the_whole_clip_is_learned(make_generation: Callable[..., Recipe]) -> None:
    """1.3 noises the damaged latents; what is wanted is still the velocity to the clean ones, 0 here: variance 1."""
    recipe = make_generation("v1_3")
    data = batch(recipe, 64, 5)
    data = replace(data, latents=torch.zeros_like(data.latents), damaged=torch.full_like(data.latents, 50.0))
    made = engine(Recorder(2))
    loss = objective(recipe, {"t2v": 1.0}, made.model).loss(made, data, step_generator(CPU, 2))
    x, t, _ = made.model.asked[0]
    torch.testing.assert_close(x.flatten(1).mean(1), 50 * (1 - t / 1000), rtol=0.05, atol=0.3)
    assert float(loss.value.detach()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("name", ["v1_0", "v1_1", "v1_2", "v1_3", "v2_0"])
def test_the_transformer_learns_a_batch_by_heart(
    make_generation: Callable[..., Recipe], make_latents: Callable[[Recipe], Path], mini: Recipe, name: str
) -> None:
    """Some tens of steps on one batch, at one draw of times and noise, take the loss well below where it began."""
    recipe = mini if name == "v2_0" else make_generation(name)
    data = LatentDataset(make_latents(recipe))
    network = new_transformer(recipe)
    made = engine(network, ADAM.model_copy(update={"lr": 5e-3}))
    stage = recipe.stages[0].model_copy(update={"conditions": {"t2v": 1.0}})
    flow = denoising(recipe, stage, network, data.null)
    keys = next(found for cell, found in data.groups("train").items() if cell.frames > 1)
    one = data.load([keys[0]] * 4)
    losses = [take_step(made, flow, [one], [step_generator(CPU, 1, step % 4)]).loss for step in range(90)]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
