"""Blended tiles: whole when one tile holds all, exact for local networks, weights summing to one, linear ramps."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ml.models.autoencoders.tiles import Tiling, tiled


def video(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def enlarge(x: Tensor) -> Tensor:
    """A decoder without context: 2 output frames and 4 x 4 pixels per cell."""
    return F.interpolate(x, scale_factor=(2.0, 4.0, 4.0), mode="nearest")


def shrink(x: Tensor) -> Tensor:
    """An encoder without context: means of 2 frames of 4 x 4 pixels."""
    return F.avg_pool3d(x, (2, 4, 4))


def causal(x: Tensor) -> Tensor:
    """A causal encoder: the first frame alone, then means of four frames."""
    rest = [F.avg_pool3d(x[:, :, 1:], (4, 1, 1))] if x.shape[2] > 1 else []
    return torch.cat([x[:, :, :1], *rest], dim=2)


def blur(x: Tensor) -> Tensor:
    """A network that sees one cell around, and zeros beyond its borders."""
    kernel = torch.ones(2, 2, 3, 3, 3, dtype=x.dtype) / 27
    return F.conv3d(x, kernel, padding=1)


def _constants(*values: float) -> Callable[[Tensor], Tensor]:
    """A network that gives another constant for every tile."""
    waiting = iter(values)
    return lambda part: torch.full_like(part, next(waiting))


def test_one_tile_is_the_network_itself() -> None:
    x, calls = video(1, 2, 5, 6, 7), list[torch.Size]()
    found = tiled(lambda part: (calls.append(part.shape), blur(part))[1], x, Tiling((5, 6, 7), (1, 2, 2)))
    assert calls == [x.shape]
    assert torch.equal(found, blur(x))


@pytest.mark.parametrize("shape", [(9, 21, 8), (8, 8, 8), (4, 6, 30), (13, 17, 5), (5, 9, 9)])
def test_networks_without_context_are_exact_at_every_size(shape: tuple[int, int, int]) -> None:
    x = video(2, 2, *shape)
    found = tiled(enlarge, x, Tiling((4, 6, 8), (1, 2, 3), (2, 4, 4)))
    torch.testing.assert_close(found, enlarge(x), rtol=0, atol=1e-12)


def test_tiles_may_shrink_what_they_are_given() -> None:
    x = video(1, 1, 12, 40, 28)
    found = tiled(shrink, x, Tiling((4, 16, 16), (2, 4, 8), (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))))
    torch.testing.assert_close(found, shrink(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 21, 25, 29, 33, 37])
def test_causal_networks_keep_their_first_frame(frames: int) -> None:
    x = video(1, 1, frames, 3, 3)
    ratio = (Fraction(1, 4), 1, 1)
    found = tiled(causal, x, Tiling((12, 3, 3), (4, 0, 0), ratio, causal=True))
    torch.testing.assert_close(found, causal(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 21, 8), (7, 10, 13), (4, 6, 30)])
def test_a_margin_as_wide_as_the_context_makes_tiles_exact(shape: tuple[int, int, int]) -> None:
    x = video(1, 2, *shape)
    exact = tiled(blur, x, Tiling((4, 6, 8), (3, 4, 4), margin=(1, 1, 1)))
    torch.testing.assert_close(exact, blur(x), rtol=0, atol=1e-12)
    assert (tiled(blur, x, Tiling((4, 6, 8), (3, 4, 4))) - blur(x)).abs().max() > 1e-3


def test_weights_sum_to_one_where_tiles_disagree() -> None:
    """Every tile gives another constant: the result stays between them, and a common constant stays itself."""
    x, tiling = torch.zeros(1, 1, 9, 20, 20, dtype=torch.float64), Tiling((4, 8, 8), (2, 3, 3))
    mixed = tiled(_constants(*range(80)), x, tiling)
    assert mixed.shape == x.shape
    assert 0 <= mixed.min() < 1 < 60 < mixed.max() <= 79
    assert torch.equal(tiled(torch.ones_like, x, tiling), torch.ones_like(x))


def test_the_ramp_starts_with_the_old_tile_and_is_linear() -> None:
    """Closed form in one row, with a last tile that lies wholly in the one before it."""
    found = tiled(_constants(0, 1, 2), torch.zeros(1, 1, 1, 1, 12), Tiling((1, 1, 8), (0, 0, 4)))
    assert found.flatten().tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]


def test_a_corner_of_four_tiles_is_blended_from_above_and_then_from_the_left() -> None:
    """Closed form at the middle of the corner, with a, b above and c, d below: c' = (a+c)/2, b' = (a+b)/2."""
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    found = tiled(_constants(a, b, c, d), torch.zeros(1, 1, 1, 8, 8), Tiling((1, 6, 6), (0, 2, 2)))
    assert found[0, 0, 0, 5, 5].item() == ((a + c) / 2 + ((a + b) / 2 + d) / 2) / 2


def test_gradients_flow_through_every_tile() -> None:
    x = video(1, 1, 5, 9, 9).requires_grad_()
    tiled(enlarge, x, Tiling((4, 6, 8), (1, 2, 3), (2, 4, 4))).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 32.0))


def test_half_precision_stays_itself() -> None:
    x = video(1, 1, 1, 4, 700).to(torch.bfloat16)
    assert torch.equal(tiled(torch.clone, x, Tiling((1, 4, 600), (0, 0, 300))), x)


@pytest.mark.parametrize(
    ("tile", "overlap", "ratio", "margin", "message"),
    [
        ((4, 4, 4), (4, 0, 0), (1, 1, 1), (0, 0, 0), "frames: an overlap of 4"),
        ((4, 9, 8), (0, 0, 0), (1, Fraction(1, 8), Fraction(1, 8)), (0, 0, 0), "height: tiles of 9"),
        ((4, 8, 8), (0, 0, 4), (1, 1, Fraction(1, 8)), (0, 0, 0), "width: .*multiples of 8"),
        ((4, 8, 8), (0, 0, 3), (1, 1, 1), (0, 0, 2), "two margins of 2"),
    ],
)
def test_tilings_that_cannot_be_cut_are_refused(tile, overlap, ratio, margin, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        Tiling(tile, overlap, ratio, margin=margin)
