import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ml.metrics import MetricError, psnr, ssim

RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)


def test_psnr_of_a_constant_error_is_the_closed_form() -> None:
    assert psnr(np.full((1, 8, 8, 3), 100), np.full((1, 8, 8, 3), 110)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(CLIP, CLIP) == 100.0
    assert psnr(np.zeros((8, 8, 3)), np.full((8, 8, 3), 255)) == pytest.approx(0.0)


def test_ssim_of_two_constant_pictures_is_the_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(np.full((20, 20, 3), 100), np.full((20, 20, 3), 150)) == pytest.approx(wanted)
    assert ssim(CLIP, CLIP) == pytest.approx(1.0)


def test_ssim_is_that_of_scipys_gaussian_filter() -> None:
    """An independent implementation: truncate 3.5 makes scipy's window 11 wide; its border is cut off."""
    left = CLIP[0, ..., 0].astype(float)
    right = np.clip(left + RNG.normal(0, 20, left.shape), 0, 255)

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = blur(left), blur(right)
    va, vb, cov = blur(left**2) - a**2, blur(right**2) - b**2, blur(left * right) - a * b
    wanted = ((2 * a * b + c1) * (2 * cov + c2) / ((a**2 + b**2 + c1) * (va + vb + c2))).mean()
    assert ssim(left[..., None], right[..., None]) == pytest.approx(float(wanted), rel=1e-9)


def test_more_noise_is_a_worse_score() -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 40)[:, None], (2, 32, 40, 3))
    scores = [ssim(smooth, smooth + RNG.normal(0, sigma, smooth.shape)) for sigma in (1, 8, 40)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.5 < scores[0]


def test_clips_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(MetricError, match="cannot be compared"):
        psnr(CLIP, CLIP[:1])
    with pytest.raises(MetricError, match="needs 11 px"):
        ssim(CLIP[:, :8], CLIP[:, :8])
