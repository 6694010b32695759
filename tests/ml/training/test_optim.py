import math

import pytest
import torch
from pydantic import ValidationError

from ml.recipe import Recipe
from ml.sections import Adam
from ml.training.optim import adamw, factor, schedule, step_generator

ADAM = Adam(lr=0.1, eps=1e-15, betas=(0.5, 0.75), weight_decay=0.0, warmup_steps=4)


def test_adam_is_built_as_the_recipe_says() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    group = adamw(ADAM)([weight]).param_groups[0]
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (0.1, 1e-15, (0.5, 0.75), 0.0)


@pytest.mark.parametrize(("steps", "wanted"), [(0, [0.1] * 3), (4, [0.02, 0.04, 0.06, 0.08, 0.1, 0.1])])
def test_warm_up_rises_in_equal_parts(steps: int, wanted: list[float]) -> None:
    section = ADAM.model_copy(update={"warmup_steps": steps})
    assert rates(section, 100, len(wanted)) == pytest.approx(wanted)


def rates(section: Adam, steps: int, count: int) -> list[float]:
    """Learning rates of the first steps of a training of so many."""
    optimizer = adamw(section)([torch.nn.Parameter(torch.zeros(1))])
    law, found = schedule(section, steps)(optimizer), []
    for _ in range(count):
        found.append(law.get_last_lr()[0])
        optimizer.step()
        law.step()
    return found


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (4, 12), (4, 5)])
def test_a_cosine_falls_to_zero_after_the_last_step(warmup: int, steps: int) -> None:
    """lr (1 + cos(pi k / n)) / 2, k steps after the warm-up of the n that follow it; what comes later stays at zero."""
    section = ADAM.model_copy(update={"warmup_steps": warmup, "schedule": "cosine"})
    found = rates(section, steps, steps + 3)
    rising = [0.1 * (k + 1) / (warmup + 1) for k in range(warmup)]
    falling = [0.05 * (1 + math.cos(math.pi * k / (steps - warmup))) for k in range(steps - warmup)]
    assert found[:steps] == pytest.approx([*rising, *falling])
    assert found[warmup] == pytest.approx(0.1), "full rate right after the warm-up"
    assert found[steps:] == pytest.approx([0.0] * 3, abs=1e-12)
    assert rates(section, steps, steps)[:warmup] == rates(
        ADAM.model_copy(update={"warmup_steps": warmup}), steps, warmup
    )


LAWS = {
    "constant": {},
    "cosine": {"min_factor": 0.1},
    "linear": {"min_factor": 0.2},
    "inverse_sqrt": {"min_factor": 0.3},
    "wsd": {"min_factor": 0.1, "decay_share": 0.25},
    "polynomial": {"min_factor": 0.1, "power": 2.0},
}


def law(name: str, **over: object) -> Adam:
    return Adam.model_validate({**ADAM.model_dump(), "schedule": name, **LAWS[name], **over})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant", {4: 1, 12: 1, 20: 1, 30: 1}),
        ("cosine", {4: 1, 12: 0.1 + 0.9 / 2, 20: 0.1, 30: 0.1}),
        ("linear", {4: 1, 12: 0.2 + 0.8 / 2, 20: 0.2, 30: 0.2}),
        ("inverse_sqrt", {4: 1, 12: math.sqrt(4 / 12), 20: math.sqrt(4 / 20), 60: 0.3}),
        ("wsd", {4: 1, 15: 1, 16: 0.1 + 0.9 * (1 - math.sqrt(1 / 5)), 20: 0.1, 30: 0.1}),
        ("polynomial", {4: 1, 12: 0.1 + 0.9 / 4, 20: 0.1, 30: 0.1}),
    ],
)
def test_each_law_is_its_formula_at_the_edges(name: str, wanted: dict[int, float]) -> None:
    """Of 20 steps, 4 of warm-up; keys are steps done, 20 is past the last one. wsd stays up to step 15 (3/4 of 20)."""
    assert [factor(law(name), step, 20) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert {step: factor(law(name), step, 20) for step in wanted} == pytest.approx(wanted)


def test_laws_never_rise_after_the_warm_up_and_need_no_warm_up() -> None:
    for name in LAWS:
        for warmup in (0, 4, 40):
            section = law(name, warmup_steps=warmup)
            found = [factor(section, step, 20) for step in range(max(0, warmup - 1), 50)]
            assert found[warmup > 0] == pytest.approx(1.0), (name, warmup)
            assert all(a >= b for a, b in zip(found[warmup > 0 :], found[(warmup > 0) + 1 :], strict=False))


@pytest.mark.parametrize("name", list(LAWS))
def test_a_resumed_schedule_goes_on_with_the_same_rates(name: str) -> None:
    whole = rates(law(name), 12, 12)
    optimizer = adamw(law(name))([torch.nn.Parameter(torch.zeros(1))])
    half = schedule(law(name), 12)(optimizer)
    for _ in range(7):
        optimizer.step()
        half.step()
    again = adamw(law(name))([torch.nn.Parameter(torch.zeros(1))])
    resumed, rest = schedule(law(name), 12)(again), []
    resumed.load_state_dict(half.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        rest.append(resumed.get_last_lr()[0])
        again.step()
        assert again.param_groups[0]["lr"] == rest[-1]
        resumed.step()
    assert rest == whole[7:]


def test_a_law_takes_its_own_numbers_and_no_others() -> None:
    for over, reason in (
        ({"min_factor": 0.1}, "constant never falls"),
        ({"schedule": "wsd"}, "schedule wsd needs decay_share"),
        ({"schedule": "polynomial"}, "schedule polynomial needs power"),
        ({"schedule": "cosine", "power": 2.0}, "schedule cosine takes no power, which is of polynomial"),
        ({"schedule": "exponential"}, "Input should be"),
    ):
        with pytest.raises(ValidationError, match=reason):
            Adam.model_validate({**ADAM.model_dump(), **over})


def test_published_recipes_keep_the_originals_laws() -> None:
    """Constant everywhere but in 1.3's stages 1 (cfg/opensora-v1-3/train), and down to zero there."""
    for name in ("v1_0", "v1_1", "v1_2", "v1_3", "v2_0", "v2_0_hc"):
        sections = [stage.optimizer for stage in Recipe.load(name).stages]
        wanted = ["cosine", "cosine", "constant", "constant"] if name == "v1_3" else ["constant"] * len(sections)
        assert [section.schedule for section in sections] == wanted
        assert {section.min_factor for section in sections} == {0.0}


def test_each_seed_rank_and_step_has_noise_of_its_own() -> None:
    cpu = torch.device("cpu")
    places = [(seed, rank, step) for seed in (0, 1) for rank in (0, 1) for step in range(50)]
    draws = [torch.randn(4, generator=step_generator(cpu, *place)) for place in places]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(places)
    assert torch.equal(draws[7], torch.randn(4, generator=step_generator(cpu, *places[7])))
    # 200 independent means of 4 normals: their spread is 0.5.
    assert float(torch.stack(draws).mean(1).std()) == pytest.approx(0.5, abs=0.1)
