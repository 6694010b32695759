"""Both processes learn the checkerboard with one network and one budget, and are judged by one distance."""

import sys

import pytest
import torch

from benchmarks.fewer_steps import OBJECTIVES, RUNS, Budget, checkerboard, main, measure, sliced_wasserstein, train

SMALL = Budget(steps=20, batch=32, width=16, samples=200)


def test_the_board_has_points_on_dark_squares_only() -> None:
    points = checkerboard(4000, torch.Generator().manual_seed(0))
    squares = ((points + 1) * 2).floor().long()
    assert set(map(tuple, squares.tolist())) == {(c, r) for c in range(4) for r in range(4) if (c + r) % 2 == 0}
    assert points.abs().max() <= 1


def test_the_distance_of_a_moved_set_is_the_mean_of_its_shadows() -> None:
    """Moved by d, a set is |d cos| away in each direction: 2/pi d on average."""
    points = checkerboard(1000, torch.Generator().manual_seed(0))
    moved = points + torch.tensor([0.3, 0.4])
    assert sliced_wasserstein(points, moved) == pytest.approx(0.5 * 2 / torch.pi, rel=1e-3)
    assert sliced_wasserstein(points, points.flip(0)) == 0


def test_training_takes_both_processes_towards_the_data() -> None:
    longer = Budget(steps=400, batch=128, width=32, samples=1000)
    before, _, floor = measure(Budget(steps=1, batch=128, width=32, samples=1000), seed=0)
    after, _, _ = measure(longer, seed=0)
    assert after["RF", 30] < before["RF", 30]
    assert after["DDPM", 100] < before["DDPM", 100]
    assert floor < min(after.values())


def test_both_networks_start_from_the_same_weights_and_are_repeatable() -> None:
    untrained = Budget(steps=1, batch=4, width=16, lr=1e-12)
    nets = [train(name, untrained, 3).layers[0].weight for name in OBJECTIVES]
    assert torch.allclose(nets[0], nets[1], atol=1e-6)
    first, second = (measure(SMALL, seed=1)[0] for _ in range(2))
    assert first == second
    assert set(first) == set(RUNS)


def test_the_table_holds_both_sides_and_the_floor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    main()
    printed = capsys.readouterr().out
    for said in ("DDPM at 100", "RF at 30", "RF at 20", "two sets of data", "3.33x", "seeds 0 to 1"):
        assert said in printed
