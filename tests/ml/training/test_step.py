from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.batching.datasets import LatentBatch, LatentDataset
from ml.diffusion.guidance import Text
from ml.engines.plain import PlainEngine
from ml.recipe import Recipe
from ml.sections import Adam, RectifiedFlow
from ml.training.networks import new_transformer
from ml.training.optim import adamw, step_generator, warm_up
from ml.training.step import FlowMatching, Loss, take_step

ADAM = Adam(lr=0.1, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
CPU = torch.device("cpu")


class Recorder(nn.Module):
    """A network that says velocity 0 and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))
        self.asked: list[dict[str, Any]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, condition: Tensor | None) -> Tensor:
        self.asked.append({"x": x, "t": t, "context": context, "pooled": pooled, "condition": condition})
        return x * 0 + self.zero


class Squares:
    """A batch is a tensor of numbers; the loss is the mean squared distance of the weight from them."""

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        value = (engine.model.weight.flatten() - data).square().mean()
        return Loss(value, len(data), 2 * len(data))


def engine(model: nn.Module, adam: Adam = ADAM) -> PlainEngine:
    made = PlainEngine(CPU, torch.float32, 1e9)
    made.setup(model, adamw(adam), warm_up(adam))
    return made


def objective(mini: Recipe, kinds: dict[Any, int], **over: Any) -> FlowMatching:
    section: RectifiedFlow = mini.objective.model_copy(update=over)
    text = mini.text
    null = Text(torch.full((text.max_tokens, text.context_dim), -5.0), torch.full((text.pooled_dim,), -7.0))
    return FlowMatching(section, kinds, mini.model.patch, null)


def batch(mini: Recipe, number: int, frames: int = 2) -> LatentBatch:
    generator = torch.Generator().manual_seed(0)
    channels = mini.autoencoder.latent_channels
    latents = torch.randn(number, channels, frames, 6, 10, generator=generator)
    tails = torch.full((number, channels, 1, 6, 10), 9.0) if frames > 1 else None
    text = mini.text
    return LatentBatch(
        latents, Text(torch.ones(number, text.max_tokens, text.context_dim), torch.ones(number, text.pooled_dim)), tails
    )


def test_micro_batches_of_equal_size_are_one_large_batch() -> None:
    data, generator = torch.arange(8.0), step_generator(CPU, 0)
    one, two = (engine(nn.Linear(1, 1, bias=False)) for _ in range(2))
    with torch.no_grad():
        one.model.weight.fill_(2.0)
        two.model.weight.fill_(2.0)
    whole = take_step(one, Squares(), [data], generator)
    parts = take_step(two, Squares(), [data[:4], data[4:]], generator)
    assert whole == parts
    # d/dw mean (w - x)^2 = 2 (2 - 3.5) = -3.
    assert whole.grad_norm == pytest.approx(3.0)
    assert (whole.loss, whole.examples, whole.tokens) == (float((2 - data).square().mean()), 8, 16)
    assert torch.equal(one.model.weight, two.model.weight)


def test_a_silent_network_has_the_loss_of_the_velocity_itself(mini: Recipe) -> None:
    """Velocity (1 - s) noise - data, both of variance 1: the mean square is about 2; tokens are 2 x 3 x 5 a clip."""
    made = engine(Recorder())
    loss = objective(mini, {"t2v": 1}, drop_context=0.0).loss(made, batch(mini, 64), step_generator(CPU, 1))
    assert float(loss.value.detach()) == pytest.approx(2.0, rel=0.05)
    assert (loss.examples, loss.tokens) == (64, 64 * 30)
    assert made.model.asked[0]["condition"] is None


def test_what_the_network_sees_lies_on_the_line_between_data_and_noise(mini: Recipe) -> None:
    """At time t it sees data and noise of variance (1-t)^2 + t^2 (sigma_min is 1e-5)."""
    made, data = engine(Recorder()), batch(mini, 256)
    objective(mini, {"t2v": 1}).loss(made, data, step_generator(CPU, 1))
    asked = made.model.asked[0]
    t, variance = asked["t"], asked["x"].flatten(1).var(1)
    assert bool(((t > 0) & (t < 1)).all())
    torch.testing.assert_close(variance, (1 - t) ** 2 + t**2, rtol=0.4, atol=0.0)
    assert float((variance / ((1 - t) ** 2 + t**2)).mean()) == pytest.approx(1, abs=0.02)


def test_each_encoder_is_dropped_by_itself_and_replaced_by_the_empty_prompt(mini: Recipe) -> None:
    made = engine(Recorder())
    objective(mini, {"t2v": 1}, drop_context=0.3, drop_pooled=0.6).loss(made, batch(mini, 4000), step_generator(CPU, 3))
    asked = made.model.asked[0]
    no_context, no_pooled = asked["context"][:, 0, 0] == -5, asked["pooled"][:, 0] == -7
    assert bool((asked["context"].flatten(1) == asked["context"][:, :1, 0]).all())
    # Binomials of 4000: +- 0.008.
    assert float(no_context.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(no_pooled.float().mean()) == pytest.approx(0.6, abs=0.03)
    assert float((no_context & no_pooled).float().mean()) == pytest.approx(0.18, abs=0.03)


def test_conditions_come_by_weight_and_give_tails_as_pictures(mini: Recipe) -> None:
    made, data = engine(Recorder()), batch(mini, 3000, frames=3)
    objective(mini, {"t2v": 1, "i2v_head": 2, "i2v_tail": 1}).loss(made, data, step_generator(CPU, 3))
    condition = made.model.asked[0]["condition"]
    masks = [tuple(row) for row in condition[:, 0, :, 0, 0].int().tolist()]
    shares = {kind: masks.count(kind) / len(masks) for kind in set(masks)}
    assert shares.keys() == {(0, 0, 0), (1, 0, 0), (0, 0, 1)}
    assert shares[1, 0, 0] == pytest.approx(0.5, abs=0.04)
    tails = condition[[mask == (0, 0, 1) for mask in masks]]
    assert bool((tails[:, 1:, -1] == 9).all())
    heads = torch.tensor([mask == (1, 0, 0) for mask in masks])
    assert torch.equal(condition[heads][:, 1:, 0], data.latents[heads][:, :, 0])


def test_an_image_batch_is_given_nothing_to_copy(mini: Recipe) -> None:
    made = engine(Recorder())
    objective(mini, {"i2v_head": 1}).loss(made, batch(mini, 4, frames=1), step_generator(CPU, 0))
    assert float(made.model.asked[0]["condition"].abs().sum()) == 0


def test_the_transformer_learns_a_batch_by_heart(mini: Recipe, latents: Path) -> None:
    """Forty steps on one batch take the loss from that of a silent network to well below it."""
    data = LatentDataset(latents)
    made = engine(new_transformer(mini), ADAM.model_copy(update={"lr": 5e-3}))
    flow = objective(mini, {"t2v": 1})
    keys = data.groups("train")
    one = data.load([next(found for cell, found in keys.items() if cell.frames == 5)[0]] * 8)
    losses = [take_step(made, flow, [one], step_generator(CPU, 1, step)).loss for step in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
