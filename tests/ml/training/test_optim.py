import math

import pytest
import torch

from ml.sections import Adam
from ml.training.optim import adamw, schedule, step_generator

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


def test_each_seed_rank_and_step_has_noise_of_its_own() -> None:
    cpu = torch.device("cpu")
    places = [(seed, rank, step) for seed in (0, 1) for rank in (0, 1) for step in range(50)]
    draws = [torch.randn(4, generator=step_generator(cpu, *place)) for place in places]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(places)
    assert torch.equal(draws[7], torch.randn(4, generator=step_generator(cpu, *places[7])))
    # 200 independent means of 4 normals: their spread is 0.5.
    assert float(torch.stack(draws).mean(1).std()) == pytest.approx(0.5, abs=0.1)
