"""Pictures and videos that a person gives: read, encoded, and put where a kind or a mask strategy wants them.

Letters: B batch, C latent channels, t h w latent grid, f latent frames of a reference.
"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ml.batching.datasets import to_video
from ml.batching.video import DecodeError, Frames, read_clip
from ml.diffusion import conditions, mask_strategy
from ml.diffusion.conditions import Given, Kind
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.sampling.requests import RequestError
from ml.shapes import MICRO_FRAMES, Size, Strides


def encode_reference(
    path: Path, size: Size, strides: Strides, autoencoder: VideoAutoencoder, latents: int | None = None
) -> Tensor:
    """A picture, or the longest part of a video from its start that can be encoded: [C,f,h,w].

    Nothing is decoded beyond the frames of the first `latents` latent frames, and of those that are encoded together
    with them; None reads to the end. Raises DecodeError for a file that cannot be read.
    """
    frames = _read(path, size, None if latents is None else frames_of(strides, latents))
    longest = next(count for count in range(len(frames), 0, -1) if strides.encodes(count))
    return encode_video(to_video([frames[:longest]]), autoencoder)[0]


def frames_of(strides: Strides, latents: int) -> int:
    """The fewest frames that have so many latents at least: in whole parts, where an autoencoder encodes in parts."""
    whole = MICRO_FRAMES if strides.law == "micro" else 1
    return next(n for n in count(whole, whole) if strides.encodes(n) and strides.latent_frames(n) >= latents)


@torch.inference_mode()
def encode_video(video: Tensor, autoencoder: VideoAutoencoder) -> Tensor:
    """Latents [B,C,t,h,w] of videos [B,3,T,H,W], on the device of the autoencoder."""
    device = next(autoencoder.parameters()).device
    return autoencoder.encode(video.to(device))


def given_by_kind(references: Sequence[Tensor], kind: Kind, grid: tuple[int, int, int], causal: bool) -> Given:
    """References [C,f,h,w] at the head, the tail or both, as a kind of 1.3 or 2.0 has it.

    A picture stands for a reference of a picture kind: its first latent at the head, its last at the tail. Raises
    RequestError for a kind that gives more than the clip has, and a reference longer than the clip; ValueError when the
    number of references is wrong, one is too short, or the kind is unknown.
    """
    lengths, frames = conditions.given_latents(kind, causal), grid[0]
    if sum(lengths) >= frames:
        shorter = conditions.fitting(kind, frames, causal)
        raise RequestError(
            f"{kind} gives {sum(lengths)} latent frames, the clip has {frames}: nothing is left to make; sample more "
            f"frames, or {shorter}"
        )
    for number, reference in enumerate(references):
        if reference.shape[1] > frames:
            raise RequestError(
                f"reference {number} has {reference.shape[1]} latent frames or more, the clip {frames}: cut the video, "
                "or sample more frames"
            )
    return Given.of(conditions.place(references, kind, grid, lengths), kind)


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


def _read(path: Path, size: Size, most: int | None) -> Frames:
    """The first `most` frames of a file, or all of them where it has fewer."""
    if most is not None:
        try:
            return read_clip(path, range(most), size)
        except DecodeError:
            # It may only be shorter than that, and is then read whole; a broken file fails again.
            pass
    return read_clip(path, None, size)
