from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from ml.engines.plain import PlainEngine
from ml.engines.world import World
from ml.methods import Engine
from ml.reconstruction import Adversarial
from ml.training.adversary import Adversary, AdversaryError

SECTION = Engine(
    kind="plain", precision="fp32", grad_clip=1.0, accumulate=1, sequence_parallel=1, checkpoint_blocks=(0, 0)
)
SMALL = Adversarial(channels=4, layers=2, lr=1e-2)


def engine() -> PlainEngine:
    made = PlainEngine(torch.device("cpu"), torch.float32, 1.0)
    made.setup(nn.Linear(1, 1), lambda p: SGD(p, lr=0.1), lambda o: LambdaLR(o, lambda _: 1.0))
    return made


def clips(seed: int) -> Tensor:
    return torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_it_learns_to_tell_the_two_apart() -> None:
    adversary = Adversary(SMALL, 0)
    losses = [adversary.learn(clips(step), 0.2 * clips(100 + step), engine()) for step in range(30)]
    assert losses[0] > 0.9
    assert losses[-1] < 0.5 * losses[0]


def test_judging_gives_a_gradient_to_the_video_only() -> None:
    adversary, video = Adversary(SMALL, 0), clips(0).requires_grad_()
    torch.autograd.backward(adversary.judge(video).mean())
    assert video.grad is not None
    assert float(video.grad.abs().max()) > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversary.network.parameters())


def learned(steps: int) -> dict[str, Tensor]:
    """What one of two ranks has learned of its own half of the clips."""
    world = World.join(SECTION, torch.device("cpu"))
    made, adversary = PlainEngine(torch.device("cpu"), torch.float32, 1.0, world), Adversary(SMALL, 0)
    for step in range(steps):
        adversary.learn(clips(2 * step + world.rank), 0.2 * clips(100 + 2 * step + world.rank), made)
    world.close()
    return adversary.network.state_dict()


def test_ranks_learn_the_same_of_all_their_clips(ranks: Callable[..., list[Any]]) -> None:
    one, other = ranks(learned, 3)
    alone = learned(3)
    for name, weight in one.items():
        if "running" not in name:  # statistics of a rank's own batches, which no judgement uses
            assert torch.equal(weight, other[name])
    assert not torch.equal(one["main.0.weight"], alone["main.0.weight"])


def spoiled(bad: float) -> list[dict[str, Tensor]]:
    """Weights before and after an update in which the last rank's clips are broken, and after a good one."""
    world = World.join(SECTION, torch.device("cpu"))
    made, adversary = PlainEngine(torch.device("cpu"), torch.float32, 1.0, world), Adversary(SMALL, 0)
    states = []
    for step, factor in enumerate((1.0, bad if world.rank == 1 else 1.0, 1.0)):
        adversary.learn(factor * clips(2 * step + world.rank), 0.2 * clips(100 + step), made)
        states.append({name: weight.detach().clone() for name, weight in adversary.network.named_parameters()})
    world.close()
    return states


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_batch_of_one_rank_teaches_nobody(ranks: Callable[..., list[Any]], bad: float) -> None:
    for before, after, later in ranks(spoiled, bad):
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert all(torch.isfinite(weight).all() for weight in later.values())
        assert any(not torch.equal(after[name], weight) for name, weight in later.items())


def test_weights_come_of_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    one, same, other = (Adversary(SMALL, seed).network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), wanted)
    assert torch.equal(one["main.0.weight"], same["main.0.weight"])
    assert not torch.equal(one["main.0.weight"], other["main.0.weight"])


def test_a_saved_adversary_goes_on_exactly(tmp_path: Path) -> None:
    first, second = Adversary(SMALL, 0), Adversary(SMALL, 1)
    for step in range(3):
        first.learn(clips(step), clips(50 + step), engine())
    first.save(tmp_path)
    second.load(tmp_path)
    for step in range(3, 6):
        found = [adversary.learn(clips(step), clips(50 + step), engine()) for adversary in (first, second)]
        assert found[0] == found[1]


def test_a_missing_or_other_adversary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdversaryError, match=r"lacks adversary\.safetensors"):
        Adversary(SMALL, 0).load(tmp_path)
    Adversary(SMALL, 0).save(tmp_path)
    with pytest.raises(AdversaryError, match="another one than the recipe's"):
        Adversary(SMALL.model_copy(update={"channels": 8}), 0).load(tmp_path)
