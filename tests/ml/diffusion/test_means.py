"""Means over frames and the weights of given ones."""

import pytest
import torch

from ml.diffusion.means import given_weights, over_frames, per_frame, per_sample


def test_frames_count_by_their_weights() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])[None, None, :, None, None].expand(2, 4, 3, 2, 2)
    assert over_frames(values).tolist() == [3.0, 3.0]
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert over_frames(values, weights).tolist() == [1.5, 6.0]
    assert over_frames(values, torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    assert over_frames(values.bfloat16()).dtype == torch.float32


def test_given_frames_have_their_weight_and_all_weights_sum_to_the_frames() -> None:
    """8 frames, 2 given at weight 0.1: the other six have (8 - 0.2) / 6 = 1.3."""
    given = torch.zeros(3, 8, dtype=torch.bool)
    given[0, :2], given[2] = True, True
    weights = given_weights(given, 0.1)
    assert weights[0].tolist() == pytest.approx([0.1, 0.1, *[1.3] * 6])
    assert weights[1].tolist() == [1.0] * 8
    assert weights[2].tolist() == pytest.approx([0.1] * 8)


def test_shapes_for_broadcasting() -> None:
    like = torch.zeros(2, 4, 3, 5, 6, dtype=torch.float64)
    assert per_sample(torch.ones(2), like).shape == (2, 1, 1, 1, 1)
    assert per_sample(torch.ones(2), like).dtype == torch.float64
    assert per_frame(torch.ones(2, 3, dtype=torch.bool), like).shape == (2, 1, 3, 1, 1)
    assert per_frame(torch.ones(2, 3, dtype=torch.bool), like).dtype == torch.bool
