"""Damage done to training clips whose targets stay whole, as 1.3 learns to clean up (aug_x, ou/train_utils.py, 1.3).

The noisy sample is made of the damaged clip's latents, `process.noisy(damaged, ...)`, the loss of the whole clip's,
`process.losses(output, whole, ...)`. Letters: B batch, T frames, H W pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ml.processes import Augmentation


def damage(video: Tensor, section: Augmentation, generator: torch.Generator) -> Tensor:
    """A batch of clips [B,3,T,H,W] in -1..1, in this order: blurred in space, blurred in time, with noise on pixels.

    Each happens with its own chance, alike for the whole batch; a factor that leaves no frame or pixel is passed over.
    """
    if _happens(section.spatial_chance, generator):
        video = blur_space(video, _one_of(section.spatial_factors, generator))
    if _happens(section.temporal_chance, generator):
        video = blur_time(video, _one_of(section.temporal_factors, generator))
    if _happens(section.pixel_noise_chance, generator):
        strength = section.pixel_noise * _uniform(generator)
        noise = torch.randn(video.shape, generator=generator, device=generator.device).to(video)
        video = (1 - strength) * video + strength * noise
    return video


def blur_space(video: Tensor, factor: int) -> Tensor:
    """[B,3,T,H,W] made smaller by a factor and large again, bilinearly."""
    return _there_and_back(video, (1.0, 1 / factor, 1 / factor))


def blur_time(video: Tensor, factor: int) -> Tensor:
    """[B,3,T,H,W] with fewer frames by a factor and all of them again, linearly in time."""
    return _there_and_back(video, (1 / factor, 1.0, 1.0))


def _there_and_back(video: Tensor, scale: tuple[float, float, float]) -> Tensor:
    if any(int(size * part) < 1 for size, part in zip(video.shape[2:], scale, strict=True)):
        return video
    small = functional.interpolate(video, scale_factor=scale, mode="trilinear", align_corners=False)
    return functional.interpolate(small, size=video.shape[2:], mode="trilinear", align_corners=False)


def _happens(chance: float, generator: torch.Generator) -> bool:
    return _uniform(generator) < chance


def _one_of(factors: tuple[int, ...], generator: torch.Generator) -> int:
    return factors[int(torch.randint(len(factors), (), generator=generator, device=generator.device).item())]


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, device=generator.device).item()
