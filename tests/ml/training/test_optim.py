import pytest
import torch

from ml.sections import Adam
from ml.training.optim import adamw, step_generator, warm_up

ADAM = Adam(lr=0.1, eps=1e-15, betas=(0.5, 0.75), weight_decay=0.0, warmup_steps=4)


def test_adam_is_built_as_the_recipe_says() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    group = adamw(ADAM)([weight]).param_groups[0]
    assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (0.1, 1e-15, (0.5, 0.75), 0.0)


@pytest.mark.parametrize(("steps", "wanted"), [(0, [0.1] * 3), (4, [0.02, 0.04, 0.06, 0.08, 0.1, 0.1])])
def test_warm_up_rises_in_equal_parts(steps: int, wanted: list[float]) -> None:
    section = ADAM.model_copy(update={"warmup_steps": steps})
    optimizer = adamw(section)([torch.nn.Parameter(torch.zeros(1))])
    schedule, rates = warm_up(section)(optimizer), []
    for _ in wanted:
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(wanted)


def test_each_seed_rank_and_step_has_noise_of_its_own() -> None:
    cpu = torch.device("cpu")
    places = [(seed, rank, step) for seed in (0, 1) for rank in (0, 1) for step in range(50)]
    draws = [torch.randn(4, generator=step_generator(cpu, *place)) for place in places]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(places)
    assert torch.equal(draws[7], torch.randn(4, generator=step_generator(cpu, *places[7])))
    # 200 independent means of 4 normals: their spread is 0.5.
    assert float(torch.stack(draws).mean(1).std()) == pytest.approx(0.5, abs=0.1)
