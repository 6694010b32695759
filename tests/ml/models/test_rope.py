"""Closed forms of rotary positions, in both layouts."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ml.models.rope import positions, rope_angles, rotate, rotate_pairs

AXES = (4, 10, 10)
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
both = pytest.mark.parametrize("turn", [rotate, rotate_pairs])


def _rotated(turn: Turn, x: Tensor, at: tuple[int, int, int]) -> Tensor:
    angles = rope_angles(torch.tensor([at]), AXES, 10000.0)
    return turn(x, angles.cos(), angles.sin())


@both
def test_products_depend_on_the_difference_of_positions_only(turn: Turn) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 24, generator=generator).double() for _ in range(2))
    here = (_rotated(turn, query, (2, 3, 5)) * _rotated(turn, key, (1, 7, 0))).sum()
    moved = (_rotated(turn, query, (2 + 9, 3 + 4, 5 + 11)) * _rotated(turn, key, (1 + 9, 7 + 4, 0 + 11))).sum()
    assert torch.allclose(here, moved, atol=1e-12)
    elsewhere = (_rotated(turn, query, (2, 3, 6)) * _rotated(turn, key, (1, 7, 0))).sum()
    assert not torch.allclose(here, elsewhere, atol=1e-3)


@both
def test_rotation_keeps_lengths_and_leaves_the_origin_alone(turn: Turn) -> None:
    x = torch.randn(1, 2, 1, 24, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(_rotated(turn, x, (0, 0, 0)), x)
    assert torch.allclose(_rotated(turn, x, (3, 1, 4)).norm(), x.norm())


def test_angles_of_the_axes_lie_side_by_side() -> None:
    angles = rope_angles(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), AXES, 10000.0)
    assert angles.shape == (3, 12)
    assert [row.count_nonzero().item() for row in angles] == [2, 5, 5]
    assert angles[0, :2].tolist() == pytest.approx([1.0, 10000.0 ** -(2 / 4)])
    assert angles[1, 2:7].tolist() == pytest.approx([10000.0 ** -(2 * i / 10) for i in range(5)])


@pytest.mark.parametrize(("turn", "lane", "partner"), [(rotate, 3, 3 + 12), (rotate_pairs, 6, 7)])
def test_the_layouts_turn_their_own_pairs_of_lanes(turn: Turn, lane: int, partner: int) -> None:
    """Angle 3 belongs to axis 1 (its second frequency): lanes 3 and 15 half-split, 6 and 7 interleaved."""
    x = torch.zeros(1, 1, 1, 24, dtype=torch.float64)
    x[..., lane] = 1.0
    turned = _rotated(turn, x, (0, 1, 0))[0, 0, 0]
    angle = 10000.0 ** -(2 / 10)
    assert turned[lane] == pytest.approx(math.cos(angle))
    assert turned[partner] == pytest.approx(math.sin(angle))
    assert turned.count_nonzero() == 2


@both
def test_every_sample_may_have_positions_of_its_own(turn: Turn) -> None:
    generator = torch.Generator().manual_seed(0)
    x, ids = torch.randn(2, 3, 5, 24, generator=generator), torch.randint(0, 9, (2, 5, 3), generator=generator)
    angles = rope_angles(ids, AXES, 10000.0)
    together = turn(x, angles.cos()[:, None], angles.sin()[:, None])
    for sample in range(2):
        assert torch.equal(together[sample], turn(x[sample], angles[sample].cos(), angles[sample].sin()))


@both
def test_half_precision_is_turned_in_float32_and_given_back_as_it_came(turn: Turn) -> None:
    x = torch.randn(1, 1, 1, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = rope_angles(torch.tensor([[3, 1, 4]]), AXES, 10000.0)
    turned = turn(x, angles.cos().float(), angles.sin().float())
    assert torch.equal(turned, turn(x.double(), angles.cos(), angles.sin()).bfloat16())


def test_positions_count_the_last_axis_first_in_whole_numbers() -> None:
    grid = positions((2, 1, 3), torch.device("cpu"))
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 0, 2]]
