"""Sampling of every generation: exact problems, frames that are given, noise that belongs to its seed."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ml.diffusion import conditions, rectified_flow, timesteps
from ml.diffusion.conditions import Given
from ml.diffusion.iddpm import Schedule
from ml.diffusion.solver import Noise, Sampler, noise, solve
from ml.diffusion.timesteps import Shape
from ml.models.inputs import Inputs, Text
from ml.processes import IDDPM, AreaShift, LinearShift, RectifiedFlow, Sampling

CLIP = Shape(17, 64, 64, 5, 16)
V1_2 = RectifiedFlow(law="v1_2", shift=AreaShift(law="v1_2"), drop_context=0.1)
V1_3 = RectifiedFlow(law="v1_3", shift=AreaShift(law="v1_3"), drop_context=0.1)
V2_0 = RectifiedFlow(law="v2_0", sigma_min=1e-5, shift=LinearShift(), drop_context=0.3)


def _sampling(**changes: Any) -> Sampling:
    basic = {"steps": 10, "guidance_text": 1.0, "resolution": "64px", "aspect": "1:1", "frames": 17, "fps": 24}
    return Sampling(**{**basic, **changes})


def _inputs(batch: int) -> tuple[Inputs, Inputs]:
    texts = [torch.full((batch, 4, 3), value).double() for value in (1.0, 0.0)]
    full, pooled = torch.ones(batch, 4, dtype=torch.bool), torch.zeros(batch, 1)
    prompt, null = (Inputs(Text(t, pooled, full), 64, 64, 17, torch.full((batch,), 24.0)) for t in texts)
    return prompt, null


def _latents(count: int, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 4, 5, 2, 2, generator=torch.Generator().manual_seed(s)).double() for s in range(count)]


@dataclass
class Recorded:
    """A network that gives a constant velocity (or noise), and keeps what it was asked."""

    output: Tensor
    x: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    inputs: list[Inputs] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        self.x.append(x.clone())
        self.t.append(t)
        self.inputs.append(inputs)
        return self.output.repeat(len(x) // len(self.output), 1, 1, 1, 1)


def _drawn(*noises: Tensor) -> Any:
    """`fresh` that gives these noises and then zeros."""
    left = list(noises)
    return lambda: left.pop(0) if left else torch.zeros_like(noises[0])


# --- Euler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "by"), [(1, 1.0), (7, 3.0), (50, 11.87)])
def test_the_exact_velocity_recovers_the_data(steps: int, by: float) -> None:
    """Straight paths: any grid ends at x0 + sigma x1."""
    data, start = _latents(2)
    velocity = rectified_flow.target(data, start, 1e-5)
    found = solve(lambda x, t, index: velocity, start, timesteps.grid(steps, by))
    assert torch.allclose(found, data + 1e-5 * start, atol=1e-12)


def test_euler_of_a_linear_velocity_has_its_closed_form() -> None:
    """dx/dt = x from t = 1 to 0 in n even steps is x (1 - 1/n)^n."""
    found = solve(lambda x, t, index: x, torch.ones(1, 1, 1, 1, 1).double(), timesteps.grid(10, 1.0))
    assert found.item() == pytest.approx(0.9**10)


@pytest.mark.parametrize(("section", "sign"), [(V1_2, 1.0), (V1_3, 1.0), (V2_0, -1.0)])
def test_every_flow_samples_along_its_own_direction(section: RectifiedFlow, sign: float) -> None:
    """1.2 and 1.3 give data minus noise in half of their channels and are told 0..1000; 2.0 the contrary, and 0..1."""
    data, start = _latents(2)
    network = Recorded(torch.cat([sign * (data - start), torch.full_like(data, 9.0)], dim=1))
    sampler, done = Sampler(section, _sampling(), CLIP), list[int]()
    found = sampler.run(network, _drawn(start), *_inputs(2), progress=done.append)
    assert torch.allclose(found, data, atol=1e-9)
    assert done == list(range(1, 11))
    unit = 1.0 if section.law == "v2_0" else 1000.0
    grid = timesteps.grid(10, sampler.shift)[:-1] * unit
    assert torch.allclose(torch.stack(network.t)[:, 0].double(), grid, rtol=1e-6)


def test_the_shift_is_the_shapes_unless_the_recipe_says_otherwise() -> None:
    shape = Shape(129, 576, 1024, 33, 2304)
    assert Sampler(V2_0, _sampling(), shape).shift == pytest.approx(11.872, abs=1e-3)
    assert Sampler(V2_0, _sampling(flow_shift=3.0), shape).shift == 3.0
    assert Sampler(V2_0, _sampling(steps=50, guidance_text=7.5, oscillate=True), shape).evaluations == 80
    with pytest.raises(ValueError, match="use euler"):
        Sampler(V2_0, _sampling(solver="ddpm"), shape)


# --- given frames -------------------------------------------------------------------------------------------------


def test_a_mask_of_1_2_keeps_edits_and_makes_frames() -> None:
    """Edit ratio 0 keeps a frame, 0.5 noises its reference once t falls to 0.5, 1 makes it from the start."""
    reference, start, velocity = _latents(3)
    mask = torch.tensor([[0.0, 0.5, 1.0, 1.0, 0.5]] * 2)
    noises = [torch.randn_like(start) for _ in range(4)]
    network = Recorded(torch.cat([velocity, velocity], 1))
    sampler = Sampler(V1_2, _sampling(steps=4, flow_shift=1.0, condition="mask"), CLIP)
    found = sampler.run(network, _drawn(start, *noises), *_inputs(2), Given(reference, mask, "mask"))
    assert torch.equal(found[:, :, 0], reference[:, :, 0])
    assert torch.allclose(found[:, :, 2:4], (start + velocity)[:, :, 2:4])
    joined = 0.5 * reference + 0.5 * noises[2]
    assert torch.allclose(found[:, :, [1, 4]], (joined + 0.5 * velocity)[:, :, [1, 4]])
    active = [[False, False, True, True, False]] * 2 + [[False, True, True, True, True]] * 2
    assert [inputs.active[0].tolist() for inputs in network.inputs if inputs.active is not None] == active
    assert torch.equal(network.x[1][:, :, 1], reference[:, :, 1])
    assert torch.allclose(network.x[2][:, :, 1], joined[:, :, 1])


def test_a_mask_of_all_ones_is_no_mask() -> None:
    """Also where rounding would put the first shifted time above 1."""
    reference, start, velocity = _latents(3)
    network = Recorded(torch.cat([velocity, velocity], 1))
    sampler = Sampler(V1_2, _sampling(flow_shift=7.2618, condition="mask"), CLIP)
    found = sampler.run(network, _drawn(start), *_inputs(2), Given(reference, torch.ones(2, 5), "mask"))
    plain = Sampler(V1_2, _sampling(flow_shift=7.2618), CLIP).run(network, _drawn(start), *_inputs(2))
    assert torch.equal(found, plain)


def test_a_mask_of_1_1_noises_at_its_level_and_updates_from_there() -> None:
    """10 steps, levels 0, 4 and 10: kept before, noised and told to be clean at the level, made after it."""
    reference, guess = _latents(2)
    mask = torch.tensor([[0.0, 0.4, 1.0, 1.0, 1.0]] * 2)
    network = Recorded(torch.cat([guess, torch.zeros_like(guess)], 1))
    sampler = Sampler(IDDPM(), _sampling(solver="ddpm", condition="mask"), CLIP)
    assert sampler.schedule is not None
    sampler.run(network, Noise((4, 5, 2, 2), [1, 2]), *_inputs(2), Given(reference.float(), mask, "mask"))
    edited = [inputs.active[0, 1].item() for inputs in network.inputs if inputs.active is not None]
    assert edited == [False] * 6 + [True] * 4
    kept = [inputs.active[0, 0].item() for inputs in network.inputs if inputs.active is not None]
    assert not any(kept)
    assert all(torch.equal(x[:, :, 1], reference[:, :, 1].float()) for x in network.x[:5])
    assert all(torch.equal(x[:, :, 0], reference[:, :, 0].float()) for x in network.x[:9])
    spread = (network.x[5][:, :, 1] - sampler.schedule.kept[4].sqrt().float() * reference[:, :, 1].float()).std()
    assert spread.item() == pytest.approx((1 - sampler.schedule.kept[4]).sqrt().item(), rel=0.4)


@pytest.mark.parametrize("sdedit", [False, True])
def test_1_3_shows_references_and_may_start_each_step_from_them(sdedit: bool) -> None:
    reference, start, velocity = _latents(3)
    again = [torch.randn_like(start) for _ in range(4)]
    given = Given.of(conditions.condition(reference, ["i2v_loop"] * 2), "i2v_loop")
    network = Recorded(torch.cat([velocity, velocity], 1))
    choices = _sampling(steps=4, flow_shift=1.0, guidance_text=7.5, guidance_image=2.5, sdedit=sdedit)
    sampler = Sampler(V1_3, choices, CLIP, "i2v_loop")
    assert sampler.evaluations == 12
    found = sampler.run(network, _drawn(start, *again), *_inputs(2), given)
    first = network.inputs[0]
    assert first.given == (0, 4)
    assert first.condition is not None
    assert torch.equal(first.condition[:2], given.condition)
    assert torch.equal(first.condition[2:4], given.condition)
    assert torch.equal(first.condition[4:, :1], given.condition[:, :1])
    assert (first.condition[4:, 1:] == 0).all()
    assert first.text.context[:, 0, 0].tolist() == [1, 1, 0, 0, 0, 0]
    noised = 0.5 * reference + 0.5 * again[2] if sdedit else start + 0.5 * velocity
    assert torch.allclose(network.x[2][:2, :, [0, 4]], noised[:, :, [0, 4]])
    assert torch.allclose(found[:, :, 1:4], (start + velocity)[:, :, 1:4])


@pytest.mark.parametrize(("kind", "restored"), [("i2v_head", True), ("v2v_head", False)])
def test_2_0_tells_the_rows_without_references_nothing_and_restores_pictures(kind: str, restored: bool) -> None:
    reference, start, velocity = _latents(3)
    given = Given.of(conditions.place([reference[0]], kind, (5, 2, 2), (1, 0)), kind)
    network = Recorded(velocity)
    choices = _sampling(guidance_text=7.5, guidance_image=3.0, condition=kind)
    found = Sampler(V2_0, choices, CLIP).run(network, _drawn(start), *_inputs(2), given)
    first = network.inputs[0]
    assert first.condition is not None
    assert first.condition.shape == (6, 5, 5, 2, 2)
    assert (first.condition[4:] == 0).all()
    assert torch.equal(first.condition[1], given.condition[0])
    assert torch.equal(found[1, :, :1], reference[0, :, :1]) == restored
    assert torch.allclose(found[:, :, 1:], (start - velocity)[:, :, 1:])


def test_a_kind_and_what_is_given_must_agree() -> None:
    start = _latents(1)[0]
    sampler = Sampler(V2_0, _sampling(condition="i2v_head"), CLIP)
    with pytest.raises(ValueError, match="sampling i2v_head but nothing is given"):
        sampler.run(Recorded(start), _drawn(start), *_inputs(2))
    with pytest.raises(ValueError, match="but i2v_tail is given"):
        sampler.run(Recorded(start), _drawn(start), *_inputs(2), Given(start, torch.ones(2, 5), "i2v_tail"))


# --- diffusion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "dpm_solver"])
def test_diffusion_of_one_point_ends_there(solver: str) -> None:
    """With the exact noise of data that is one point, ancestral steps end at it, DPM-Solver++ at the least noise."""
    point = _latents(1)[0]
    trained = Schedule.of(IDDPM())

    def network(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        # DPM-Solver++ asks between training steps: log alpha is linear there.
        low = t[0].long().clamp(max=998)
        logs = trained.kept.log() / 2
        alpha = torch.exp(logs[low] + (t[0].double() - low) * (logs[low + 1] - logs[low]))
        guess = (x - alpha * point) / (1 - alpha**2).sqrt()
        return torch.cat([guess, torch.zeros_like(guess)], 1)

    sampler = Sampler(IDDPM(), _sampling(solver=solver, steps=20), CLIP)
    found = sampler.run(network, Noise((4, 5, 2, 2), [3, 4]), *_inputs(2))
    assert (found - point).abs().max() < (1e-6 if solver == "ddpm" else 0.06)


def test_the_released_hundred_steps_are_told_training_steps() -> None:
    start = _latents(1)[0]
    network = Recorded(torch.cat([start, start], 1))
    sampler = Sampler(IDDPM(), _sampling(solver="ddpm", steps=100, guidance_text=7.0, guided_channels=3), CLIP)
    sampler.run(network, Noise((4, 5, 2, 2), [1, 2]), *_inputs(2))
    assert sampler.evaluations == 200
    told = [int(t[0]) for t in network.t]
    assert told[:3] == [999, 989, 979]
    assert told[-3:] == [20, 10, 0]
    assert len(network.x[0]) == 4


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_its_seed_not_to_its_batch() -> None:
    together, alone = noise((16, 3, 2, 2), [7, 8]), noise((16, 3, 2, 2), [8])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert together.std().item() == pytest.approx(1.0, abs=0.1)
    fresh = Noise((16, 3, 2, 2), [7, 8])
    assert torch.equal(fresh(), together)
    assert not torch.equal(fresh(), together)


def test_a_sample_of_random_steps_does_not_depend_on_its_batch() -> None:
    def network(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return torch.cat([x.tanh(), x.sin()], 1)

    sampler = Sampler(IDDPM(), _sampling(solver="ddpm"), CLIP)
    together = sampler.run(network, Noise((4, 5, 2, 2), [7, 8]), *_inputs(2))
    alone = sampler.run(network, Noise((4, 5, 2, 2), [8]), *_inputs(1))
    assert torch.allclose(together[1:], alone, atol=1e-5)
