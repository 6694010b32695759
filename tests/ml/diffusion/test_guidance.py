"""Guidance with merged rows equals guidance with three rows a step, at 80 and 110 evaluations in place of 150."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ml.diffusion import timesteps
from ml.diffusion.conditions import Kind, condition
from ml.diffusion.guidance import Guidance, GuidedVelocity, Row, Text, num_evaluations, plan
from ml.diffusion.solver import solve
from ml.models.mmdit import MMDiT, build_mmdit
from ml.recipe import Recipe

PAPER = Guidance.of(Recipe.load("v2_0", "paper").sampling)
TINY = Recipe.load("v2_0", "tiny")


@dataclass
class Counting:
    """A network that counts the rows it evaluates."""

    network: MMDiT
    rows: int = 0
    batches: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, given: Tensor | None) -> Tensor:
        self.rows += len(x)
        self.batches.append(len(x))
        velocity: Tensor = self.network(x, t, context, pooled, given)
        return velocity


@pytest.fixture(scope="module")
def network() -> MMDiT:
    torch.manual_seed(0)
    built = build_mmdit(TINY.model.model_copy(update={"double_blocks": 1, "single_blocks": 1}), TINY.text, 16).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return built.eval()


def _texts(batch: int) -> tuple[Text, Text]:
    g = torch.Generator().manual_seed(2)
    embedded = [(torch.randn(batch, 6, 384, generator=g), torch.randn(batch, 384, generator=g)) for _ in range(2)]
    prompt, negative = (Text(context.double(), pooled.double()) for context, pooled in embedded)
    return prompt, negative


def _three_rows(network: MMDiT, kind: Kind, steps: int, given: Tensor | None, texts: tuple[Text, Text]):
    """Open-Sora 2.0's rule as its fact sheet states it: [prompt, negative, negative] with [c, c, 0], every step."""
    prompt, negative = texts

    def velocity(x: Tensor, t: float, index: int) -> Tensor:
        time, nothing = torch.full((len(x),), t), torch.zeros(len(x), 17, *x.shape[2:]).double()
        c = nothing if given is None else given
        p = network(x, time, prompt.context, prompt.pooled, c)
        u = network(x, time, negative.context, negative.pooled, c)
        n = network(x, time, negative.context, negative.pooled, nothing)
        full = index < 10 or index % 2 == 0
        text, image = (PAPER.text, PAPER.image) if full else (1.0, 1.0)
        scale = torch.tensor(image).double()
        if "i2v" in kind and image > 1.0:
            top = torch.linspace(image, 1.0, steps + 1).double()[index]
            scale = (1 + (top - 1) * torch.linspace(0, 1, x.shape[2]).double())[None, None, :, None, None]
        return n + scale * (u - n) + text * (p - u)

    return velocity


@pytest.mark.parametrize(
    ("kind", "evaluations"), [("t2v", 80), ("i2v_head", 110), ("i2v_loop", 110), ("v2v_head", 110)]
)
def test_fifty_steps_evaluate_only_what_matters(kind: Kind, evaluations: int) -> None:
    assert num_evaluations(plan(PAPER, 50, kind, 33)) == evaluations


@pytest.mark.parametrize(("kind", "evaluations"), [("t2v", 80), ("i2v_head", 110)])
def test_merged_rows_give_the_sample_of_three_rows(network: MMDiT, kind: Kind, evaluations: int) -> None:
    g = torch.Generator().manual_seed(1)
    start, latent = (torch.randn(1, 16, 3, 2, 2, generator=g).double() for _ in range(2))
    given = None if kind == "t2v" else condition(latent, [kind])
    texts, grid, counting = _texts(1), timesteps.grid(50, 2.0), Counting(network)
    guided = GuidedVelocity(counting, plan(PAPER, 50, kind, 3), *texts, given)
    merged = solve(guided, start, grid)
    plain = solve(_three_rows(network, kind, 50, given, texts), start, grid)
    assert counting.rows == evaluations
    assert (merged - plain).abs().max() < 1e-9
    assert (merged - start).abs().max() > 0.1


def test_rows_of_a_step_go_through_the_network_together(network: MMDiT) -> None:
    counting = Counting(network)
    x = torch.randn(2, 16, 3, 2, 2).double()
    steps = plan(PAPER, 50, "i2v_head", 3)
    guided = GuidedVelocity(counting, steps, *_texts(2), condition(x, ["i2v_head", "i2v_head"]))
    with torch.no_grad():
        guided(x, 0.5, 0)
        guided(x, 0.5, 11)
    assert counting.batches == [6, 2]


def test_weights_of_a_step_sum_to_one_and_image_guidance_ramps_over_time() -> None:
    first, last = plan(PAPER, 50, "i2v_head", 5)[0], plan(PAPER, 50, "i2v_head", 5)[48]
    nothing = Row("negative", False)
    assert [sum(frame) for frame in zip(*_wide(first.weights, 5), strict=True)] == pytest.approx([1.0] * 5)
    assert first.weights[nothing] == pytest.approx((0.0, -0.5, -1.0, -1.5, -2.0))
    assert last.weights[nothing][-1] == pytest.approx(-2.0 * 2 / 50)
    assert plan(PAPER, 50, "t2v", 5)[0].weights == {Row("prompt", False): (7.5,), Row("negative", False): (-6.5,)}
    assert plan(PAPER, 50, "i2v_head", 5)[11].weights == {Row("prompt", True): (1.0,)}


def test_without_oscillation_every_step_is_guided() -> None:
    steady = Guidance(text=7.5, image=3.0, oscillate=False)
    assert num_evaluations(plan(steady, 50, "t2v", 5)) == 100
    assert num_evaluations(plan(steady, 50, "i2v_head", 5)) == 150
    assert num_evaluations(plan(Guidance(1.0, 1.0, False), 50, "i2v_head", 5)) == 50


def _wide(weights: dict[Row, tuple[float, ...]], frames: int) -> list[tuple[float, ...]]:
    return [weight * frames if len(weight) == 1 else weight for weight in weights.values()]
