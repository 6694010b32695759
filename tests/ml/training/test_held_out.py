from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ml.batching.datasets import LatentDataset
from ml.diffusion.process import build_process
from ml.recipe import Recipe
from ml.training.held_out import Asked, Grid, chosen_clips, even_times, held_out_loss
from ml.training.networks import new_transformer

CPU = torch.device("cpu")


def grid(latents: LatentDataset, objective: Any, number: int = 3, seed: int = 1) -> Grid:
    return Grid(chosen_clips(latents.groups("holdout"), number, seed), even_times(4), seed, build_process(objective))


def test_times_are_the_middles_of_equal_parts() -> None:
    assert even_times(4) == (0.125, 0.375, 0.625, 0.875)


def test_clips_are_chosen_whole(latents: Path) -> None:
    groups = LatentDataset(latents).groups("holdout")
    keys = [key for found in chosen_clips(groups, 2, 0).values() for key in found]
    assert len(keys) == 4
    assert len({key.split("/")[0] for key in keys}) == 2
    assert {key for found in chosen_clips(groups, 99, 0).values() for key in found} == {
        k for v in groups.values() for k in v
    }


def test_the_untrained_network_has_the_loss_of_the_velocity(latents: Path, mini: Recipe) -> None:
    """It says velocity 0 (zero last layer), and data and noise have variance 1 each."""
    data = LatentDataset(latents)
    found = held_out_loss(new_transformer(mini).eval(), data, grid(data, mini.objective), CPU)
    assert found.mean == pytest.approx(2.0, rel=0.05)
    assert found.by_timestep == pytest.approx([2.0] * 4, rel=0.1)
    assert set(found.by_bucket) == {"48x80/48x80/1", "48x80/48x80/5"}
    assert found.mean == pytest.approx(sum(found.by_timestep) / 4, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_work_is_shared_out_whole_in_equal_numbers(size: int) -> None:
    """Every part once; a rank that has nothing left repeats one that does not count."""
    network, parts = torch.nn.Identity(), ["a", "b", "c", "d", "e"]
    shares = [list(Asked(network, network, CPU, rank=rank, size=size).shares(parts)) for rank in range(size)]
    assert {len(share) for share in shares} == {-(-5 // size)}
    assert sorted(part for share in shares for part, counted in share if counted) == parts


def test_batches_of_a_bucket_are_as_large_as_is_asked(latents: Path, mini: Recipe) -> None:
    data, network = LatentDataset(latents), new_transformer(mini).eval()
    one = grid(data, mini.objective)
    small = replace(one, sizes=dict.fromkeys(one.keys, 2))
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["img"])), with_kwargs=True)
    whole, parted = (held_out_loss(network, data, asked, CPU) for asked in (one, small))
    assert seen == [3] * 8 + ([2] * 4 + [1] * 4) * 2
    assert parted.mean == pytest.approx(whole.mean, rel=1e-6)
    assert parted.by_bucket == pytest.approx(whole.by_bucket, rel=1e-6)


def test_the_same_seed_measures_the_same(latents: Path, mini: Recipe) -> None:
    data, network = LatentDataset(latents), new_transformer(mini).eval()
    one, again, other = (grid(data, mini.objective, seed=seed) for seed in (1, 1, 2))
    assert held_out_loss(network, data, one, CPU) == held_out_loss(network, data, again, CPU)
    assert held_out_loss(network, data, one, CPU) != held_out_loss(network, data, other, CPU)


@pytest.mark.parametrize(("name", "wanted"), [("v1_0", 1.0), ("v1_1", 1.0), ("v1_2", 2.0), ("v1_3", 2.0)])
def test_a_silent_network_of_every_generation_has_the_loss_of_what_it_does_not_say(
    make_generation: Any, make_latents: Any, name: str, wanted: float
) -> None:
    """Of noise, of variance 1 (1.0, 1.1); of a velocity, of variance 2 (1.2, 1.3, whose last layers start random)."""
    recipe = make_generation(name)
    data, network = LatentDataset(make_latents(recipe)), new_transformer(recipe).eval()
    with torch.no_grad():
        network.final_layer.linear.weight.zero_()
    found = held_out_loss(network, data, grid(data, recipe.objective), CPU)
    assert found.by_timestep == pytest.approx([wanted] * 4, rel=0.1)
    assert found.mean == pytest.approx(wanted, rel=0.05)
