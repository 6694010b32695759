"""Guidance with merged rows equals guidance with all rows of a step, at 80 and 110 evaluations in place of 150."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ml.diffusion import timesteps
from ml.diffusion.conditions import condition
from ml.diffusion.guidance import Guidance, Guided, Row, fix_flaw, null_text, num_evaluations, plan
from ml.diffusion.solver import solve
from ml.models.inputs import Inputs, Text
from ml.processes import IDDPM, AreaShift, LinearShift, RectifiedFlow, Sampling

V2 = Guidance(text=7.5, image=3.0, oscillate=True, ramp=True)
V3 = Guidance(text=7.5, image=2.5, oscillate=True, ramp=True, closed=True)


def network(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    """A network in miniature: of x, time, text and condition, none of them linearly; twice the channels."""
    said = (inputs.text.context * inputs.text.mask[..., None]).sum((1, 2))[:, None, None, None, None]
    shown = 0.0 if inputs.condition is None else (inputs.condition[:, 1:] * 1.7 + inputs.condition[:, :1]).tanh()
    found = torch.tanh(x * (1 + said.sin()) + shown) + t.to(x.dtype)[:, None, None, None, None] * said.cos()
    return torch.cat([found, found.square() - said], dim=1)


@dataclass
class Counting:
    """The network, counting the rows it evaluates."""

    batches: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        assert len(t) == len(x) == len(inputs.text.context)
        self.batches.append(len(x))
        return network(x, t, inputs)[:, : x.shape[1]]


def _inputs(batch: int) -> tuple[Inputs, Inputs]:
    g = torch.Generator().manual_seed(2)
    texts = [Text(torch.randn(batch, 6, 3, generator=g).double(), torch.zeros(batch, 1), _mask(batch)) for _ in "pn"]
    prompt, null = (Inputs(text, 16, 16, 9, torch.full((batch,), 24.0)) for text in texts)
    return prompt, null


def _mask(batch: int) -> Tensor:
    return (torch.arange(6) < 4).expand(batch, -1)


def _latents(count: int, batch: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 4, 3, 2, 2, generator=g).double() for _ in range(count)]


def _three_rows(guidance: Guidance, kind: str, steps: int, shown: tuple[Tensor, Tensor] | None) -> Any:
    """The rule as the fact sheet states it: [prompt, negative, negative] with [c, c, nothing], at every step."""
    prompt, null = _inputs(1)
    c, nothing = shown or (None, None)

    def velocity(x: Tensor, t: float, index: int) -> Tensor:
        time = torch.full((len(x),), t).double()
        rows = [replace(prompt, condition=c), replace(null, condition=c), replace(null, condition=nothing)]
        p, u, n = (network(x, time, row)[:, : x.shape[1]] for row in rows)
        full = index < 10 or index % 2 == 0
        text, image = (guidance.text, guidance.image) if full else (1.0, 1.0)
        scale = torch.tensor(image).double()
        if image > 1.0 and (guidance.closed or "i2v" in kind):
            top = torch.linspace(image, 1.0, steps if guidance.closed else steps + 1).double()[index]
            scale = torch.stack([1 + (top - 1) * f / (x.shape[2] - 1) for f in range(x.shape[2])])
            scale = scale[None, None, :, None, None]
        return n + scale * (u - n) + text * (p - u)

    return velocity


@pytest.mark.parametrize(
    ("kind", "evaluations"), [("t2v", 80), ("mask", 80), ("i2v_head", 110), ("i2v_loop", 110), ("v2v_head", 110)]
)
def test_fifty_steps_evaluate_only_what_matters(kind: str, evaluations: int) -> None:
    assert num_evaluations(plan(V2, 50, kind, 33)) == evaluations


@pytest.mark.parametrize(
    ("guidance", "kind", "evaluations"),
    [(V2, "t2v", 80), (V2, "i2v_head", 110), (V2, "v2v_head", 110), (V3, "i2v_head", 110), (V3, "v2v_head", 110)],
)
def test_merged_rows_give_the_sample_of_three_rows(guidance: Guidance, kind: str, evaluations: int) -> None:
    """In 2.0 a row without given latents is told nothing; in 1.3 it is still told which frames would be given."""
    start, latent = _latents(2)
    given = None if kind == "t2v" else condition(latent, ["i2v_head"])
    nothing = None if given is None else torch.zeros_like(given)
    if guidance.closed and given is not None and nothing is not None:
        nothing[:, 0] = given[:, 0]
    prompt, null = (replace(part, condition=given) for part in _inputs(1))
    counting, grid = Counting(), timesteps.grid(50, 2.0)
    guided = Guided(counting, guidance, plan(guidance, 50, kind, 3), prompt, null, nothing)
    merged = solve(lambda x, t, i: guided(x, torch.full((len(x),), t).double(), i), start, grid)
    shown = None if given is None or nothing is None else (given, nothing)
    plain = solve(_three_rows(guidance, kind, 50, shown), start, grid)
    assert sum(counting.batches) == evaluations
    assert (merged - plain).abs().max() < 1e-9
    assert (merged - start).abs().max() > 0.1


def test_two_rows_of_1_0_guide_some_channels_and_keep_the_conditional_rest() -> None:
    """Channels 0 to 2 of 4 are guided; channel 3 and the learned variance are the prompt's."""
    x, (prompt, null) = _latents(1, batch=2)[0], _inputs(2)
    t = torch.full((2,), 0.4).double()
    p, n = (network(x, t, inputs) for inputs in (prompt, null))
    guidance = Guidance(text=7.0, channels=3)
    found = Guided(network, guidance, plan(guidance, 1, "t2v", 3), prompt, null)(x, t, 0)
    assert torch.allclose(found[:, :3], n[:, :3] + 7 * (p - n)[:, :3], atol=1e-10)
    assert torch.equal(found[:, 3:], p[:, 3:])
    every = Guided(network, Guidance(text=7.0), plan(guidance, 1, "t2v", 3), prompt, null)(x, t, 0)
    assert torch.allclose(every[:, :4], n[:, :4] + 7 * (p - n)[:, :4], atol=1e-10)
    assert torch.equal(every[:, 4:], p[:, 4:])


def test_the_flaw_fix_pulls_the_spread_of_every_sample() -> None:
    """v (0.7 std(v_cond) / std(v) + 0.3): with twice the spread, 0.65."""
    conditional = _latents(1, batch=2)[0]
    assert torch.allclose(fix_flaw(conditional * 2, conditional), conditional * 2 * 0.65)
    x, (prompt, null) = conditional, _inputs(2)
    t, guidance = torch.full((2,), 0.4).double(), Guidance(text=7.5, flaw_fix=True)
    p, n = (network(x, t, inputs)[:, :4] for inputs in (prompt, null))
    v = n + 7.5 * (p - n)
    factor = 0.7 * p.flatten(1).std(1) / v.flatten(1).std(1) + 0.3
    found = Guided(network, guidance, plan(guidance, 1, "t2v", 3), prompt, null)(x, t, 0)
    assert torch.allclose(found[:, :4], v * factor[:, None, None, None, None])
    shown = replace(prompt, condition=condition(x, ["i2v_head"] * 2))
    steps = plan(replace(guidance, text=1.0), 1, "i2v_head", 3)
    unfixed = Guided(network, guidance, steps, shown, null, None)(x, t, 0)
    assert torch.equal(unfixed, network(x, t, shown))


def test_rows_of_a_step_go_through_the_network_together() -> None:
    counting = Counting()
    x = torch.randn(2, 4, 3, 2, 2).double()
    given = condition(x, ["i2v_head", "i2v_head"])
    prompt, null = (replace(part, condition=given) for part in _inputs(2))
    guided = Guided(counting, V2, plan(V2, 50, "i2v_head", 3), prompt, null, torch.zeros_like(given))
    guided(x, torch.full((2,), 0.5), 0)
    guided(x, torch.full((2,), 0.5), 11)
    assert counting.batches == [6, 2]


def test_weights_of_a_step_sum_to_one_and_image_guidance_ramps_over_time() -> None:
    first, last = plan(V2, 50, "i2v_head", 5)[0], plan(V2, 50, "i2v_head", 5)[48]
    nothing = Row("negative", False)
    assert [sum(frame) for frame in zip(*_wide(first.weights, 5), strict=True)] == pytest.approx([1.0] * 5)
    assert first.weights[nothing] == pytest.approx((0.0, -0.5, -1.0, -1.5, -2.0))
    assert last.weights[nothing][-1] == pytest.approx(-2.0 * 2 / 50)
    assert plan(V2, 50, "t2v", 5)[0].weights == {Row("prompt", False): (7.5,), Row("negative", False): (-6.5,)}
    assert plan(V2, 50, "i2v_head", 5)[11].weights == {Row("prompt", True): (1.0,)}
    assert plan(V2, 50, "v2v_head", 5)[0].weights[nothing] == (-2.0,)


def test_the_ramp_of_1_3_ends_at_one() -> None:
    """30 steps, oscillation off: the last step's image guidance is 1 everywhere, which needs no third row."""
    steady = replace(V3, oscillate=False)
    steps = plan(steady, 30, "v2v_head", 4)
    assert steps[0].weights[Row("negative", False)] == pytest.approx((0.0, -0.5, -1.0, -1.5))
    assert Row("negative", False) not in steps[29].weights
    assert num_evaluations(steps) == 89


def test_without_oscillation_every_step_is_guided() -> None:
    steady = Guidance(text=7.5, image=3.0)
    assert num_evaluations(plan(steady, 50, "t2v", 5)) == 100
    assert num_evaluations(plan(steady, 50, "i2v_head", 5)) == 150
    assert num_evaluations(plan(Guidance(1.0, 1.0), 50, "i2v_head", 5)) == 50
    assert num_evaluations(plan(Guidance(1.0, 3.3), 50, "t2v", 5)) == 50


def test_no_text_is_the_null_context_with_the_prompts_mask_or_the_negative_prompt() -> None:
    prompt, negative = (inputs.text for inputs in _inputs(2))
    null = null_text(prompt, torch.arange(24.0).reshape(8, 3))
    assert torch.equal(null.context[1], torch.arange(18.0).reshape(6, 3).double())
    assert torch.equal(null.mask, prompt.mask)
    assert null_text(prompt, torch.zeros(8, 3), negative).context is not None
    assert torch.equal(null_text(prompt, torch.zeros(8, 3), negative).context, negative.context)
    with pytest.raises(ValueError, match="embed the negative prompt"):
        null_text(prompt, None)
    with pytest.raises(ValueError, match="6 tokens, the network's null context 2"):
        null_text(prompt, torch.zeros(2, 3))


def test_guidance_is_read_from_the_recipes_sections() -> None:
    common: dict[str, Any] = {"steps": 50, "guidance_text": 7.0, "resolution": "256px", "aspect": "1:1", "frames": 16}
    early = Sampling(**common, fps=8, solver="ddpm", guided_channels=3)
    assert Guidance.of(IDDPM(), early) == Guidance(text=7.0, channels=3)
    later = Sampling(**common, fps=24, guidance_image=3.0, oscillate=True, ramp=True)
    flow = RectifiedFlow(law="v2_0", shift=LinearShift(), drop_context=0.3)
    assert Guidance.of(flow, later) == Guidance(7.0, 3.0, True, True)
    flow = RectifiedFlow(law="v1_3", shift=AreaShift(law="v1_3"), drop_context=0.1)
    assert Guidance.of(flow, later).closed


def _wide(weights: dict[Row, tuple[float, ...]], frames: int) -> list[tuple[float, ...]]:
    return [weight * frames if len(weight) == 1 else weight for weight in weights.values()]
