"""PSNR and SSIM of pictures and clips, in numpy.

Letters: T frames, H W pixels. Arrays hold values of 0..255, pictures [H,W,3], clips [T,H,W,3].
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PEAK = 255.0
# Two equal clips have no error; this stands for infinite, so that means stay finite.
MAX_PSNR_DB = 100.0
# Window and constants of Wang et al. 2004, "Image quality assessment", doi 10.1109/TIP.2003.819861.
SSIM_WINDOW_PX, SSIM_SIGMA_PX, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


class MetricError(ValueError):
    """Two pictures that cannot be compared, with their shapes."""


def psnr(left: NDArray[np.generic], right: NDArray[np.generic]) -> float:
    """Peak signal-to-noise ratio in dB over all values of two clips or pictures; at most 100."""
    one, other = _pair(left, right)
    error = float(np.mean((one - other) ** 2))
    return MAX_PSNR_DB if error == 0 else min(MAX_PSNR_DB, 10 * float(np.log10(PEAK**2 / error)))


def ssim(left: NDArray[np.generic], right: NDArray[np.generic]) -> float:
    """Structural similarity, mean over the window positions inside the picture, its channels, and its frames.

    Raises MetricError for pictures smaller than the 11 px window.
    """
    one, other = _pair(left, right)
    if min(one.shape[-3:-1]) < SSIM_WINDOW_PX:
        raise MetricError(f"SSIM needs {SSIM_WINDOW_PX} px in height and width, the pictures are {one.shape}")
    c1, c2 = (SSIM_K1 * PEAK) ** 2, (SSIM_K2 * PEAK) ** 2
    mean_one, mean_other = _blur(one), _blur(other)
    var_one, var_other = _blur(one**2) - mean_one**2, _blur(other**2) - mean_other**2
    covariance = _blur(one * other) - mean_one * mean_other
    similar = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    return float(np.mean(similar / ((mean_one**2 + mean_other**2 + c1) * (var_one + var_other + c2))))


def _pair(left: NDArray[np.generic], right: NDArray[np.generic]) -> tuple[Array, Array]:
    if left.shape != right.shape or left.ndim not in (3, 4):
        raise MetricError(f"clips of shapes {left.shape} and {right.shape} cannot be compared: give [T,H,W,3] twice")
    return left.astype(np.float64), right.astype(np.float64)


def _blur(clip: Array) -> Array:
    """Gaussian-weighted local mean over H and W, at positions where the window lies inside."""
    offsets = np.arange(SSIM_WINDOW_PX) - SSIM_WINDOW_PX // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA_PX**2))
    window /= window.sum()
    for axis in (clip.ndim - 3, clip.ndim - 2):
        clip = np.lib.stride_tricks.sliding_window_view(clip, SSIM_WINDOW_PX, axis=axis) @ window
    return clip
