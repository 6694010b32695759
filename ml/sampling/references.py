"""Pictures and videos that a person gives: read, encoded, and put where a kind or a mask strategy wants them.

Letters: B batch, C latent channels, t h w latent grid, f latent frames of a reference.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ml.batching.datasets import to_video
from ml.batching.video import read_clip
from ml.diffusion import conditions, mask_strategy
from ml.diffusion.conditions import Given, Kind
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.shapes import Size, Strides


def encode_reference(path: Path, size: Size, strides: Strides, autoencoder: VideoAutoencoder) -> Tensor:
    """A picture, or the longest part of a video from its start that can be encoded: [C,f,h,w].

    Raises DecodeError for a file that cannot be read.
    """
    frames = read_clip(path, None, size)
    longest = next(count for count in range(len(frames), 0, -1) if strides.encodes(count))
    return encode_video(to_video([frames[:longest]]), autoencoder)[0]


@torch.inference_mode()
def encode_video(video: Tensor, autoencoder: VideoAutoencoder) -> Tensor:
    """Latents [B,C,t,h,w] of videos [B,3,T,H,W], on the device of the autoencoder."""
    device = next(autoencoder.parameters()).device
    return autoencoder.encode(video.to(device))


def given_by_kind(references: Sequence[Tensor], kind: Kind, grid: tuple[int, int, int], causal: bool) -> Given:
    """References [C,f,h,w] at the head, the tail or both, as a kind of 1.3 or 2.0 has it.

    A picture stands for a reference of a picture kind: its first latent at the head, its last at the tail. Raises
    ValueError when the number of references is wrong or one is too short.
    """
    kind = conditions.fitting(kind, grid[0], causal)
    return Given.of(conditions.place(references, kind, grid, conditions.ends(kind, grid[0], causal)), kind)


def given_by_strategy(
    shape: tuple[int, ...],
    references: Sequence[Sequence[Tensor]],
    placements: Sequence[mask_strategy.Placement],
    loop: int,
    align: int | None,
) -> Given | None:
    """What a mask strategy gives to each of B clips [C,t,h,w] in a loop; None when it gives nothing.

    `references` are those of each clip. Raises MaskStrategyError.
    """
    if not any(placement.loop == loop for placement in placements):
        return None
    empty = torch.zeros(shape)
    parts = [mask_strategy.apply(empty, own, placements, loop, align) for own in references]
    return Given(torch.stack([latent for latent, _ in parts]), torch.stack([mask for _, mask in parts]), "mask")
