"""What the transformer is given of the clip it makes: nothing (t2v), a first or last picture (i2v), a stretch (v2v).

Letters: B batch, C latent channels, t h w latent grid. A condition is [B,C+1,t,h,w]: the mask (1 = given), then the
latent where it is given and zero elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head", "v2v_tail"]

# Latents given at (head, tail). v2v gives 33 frames, which are 9 latents (Open-Sora 2.0, scripts/diffusion/train.py).
GIVEN: dict[Kind, tuple[int, int]] = {
    "t2v": (0, 0),
    "i2v_head": (1, 0),
    "i2v_tail": (0, 1),
    "i2v_loop": (1, 1),
    "v2v_head": (9, 0),
    "v2v_tail": (0, 9),
}
# What a clip too short for a kind gets: something must be left to make.
SHORTER: dict[Kind, Kind] = {
    "v2v_head": "i2v_head",
    "v2v_tail": "i2v_tail",
    "i2v_loop": "i2v_head",
    "i2v_head": "t2v",
    "i2v_tail": "t2v",
}


def fitting(kind: Kind, latent_frames: int) -> Kind:
    """The kind itself, or the nearest one that leaves at least one latent frame to make."""
    while sum(GIVEN[kind]) >= max(latent_frames, 1):
        kind = SHORTER[kind]
    return kind


def draw(weights: Mapping[Kind, int], count: int, generator: torch.Generator) -> list[Kind]:
    """One kind a sample, by weight."""
    kinds = list(weights)
    shares = torch.tensor([float(weights[kind]) for kind in kinds], device=generator.device)
    return [kinds[i] for i in torch.multinomial(shares, count, replacement=True, generator=generator).tolist()]


def mask(kind: Kind, latent_frames: int, device: torch.device | str = "cpu") -> Tensor:
    """[t] with 1 where latents are given, after `fitting`."""
    head, tail = GIVEN[fitting(kind, latent_frames)]
    index = torch.arange(latent_frames, device=device)
    return ((index < head) | (index >= latent_frames - tail)).float()


def condition(latent: Tensor, kinds: Sequence[Kind], tails: Tensor | None = None) -> Tensor:
    """Condition [B,C+1,t,h,w] of a batch of latents [B,C,t,h,w], one kind a sample.

    `tails` [B,C,1,h,w] is the last frame encoded alone, which is what a person gives at sampling time; it stands for
    the last latent of i2v_tail and i2v_loop. Without it their own last latent is given.
    """
    frames = latent.shape[2]
    masks = torch.stack([mask(kind, frames, latent.device) for kind in kinds]).to(latent.dtype)
    given = latent.clone()
    if tails is not None:
        pictures = [row for row, kind in enumerate(kinds) if GIVEN[fitting(kind, frames)][1] == 1]
        given[pictures, :, -1:] = tails[pictures].to(latent.dtype)
    masks = masks[:, None, :, None, None].expand(-1, 1, -1, *latent.shape[3:])
    return torch.cat([masks, given * masks], dim=1)


def place(references: Sequence[Tensor], kind: Kind, grid: tuple[int, int, int]) -> Tensor:
    """Condition [1,C+1,t,h,w] from encoded references [C,f,h,w]: the head's, then the tail's, as `kind` needs them.

    A reference longer than its place is cut (a head keeps its first latents, a tail its last). Raises ValueError when
    the number of references is wrong, or a reference is too short.
    """
    frames, height, width = grid
    kind = fitting(kind, frames)
    places = [(end, length) for end, length in zip(("head", "tail"), GIVEN[kind], strict=True) if length]
    if len(references) != len(places):
        raise ValueError(f"{kind} takes {len(places)} references, got {len(references)}")
    if not places:
        raise ValueError("t2v takes no condition: pass None to the network")
    latent = torch.zeros(1, references[0].shape[0], frames, height, width, dtype=references[0].dtype)
    for reference, (end, length) in zip(references, places, strict=True):
        if reference.shape[1] < length:
            raise ValueError(f"{kind} needs {length} latents at the {end}, the reference has {reference.shape[1]}")
        if end == "head":
            latent[0, :, :length] = reference[:, :length]
        else:
            latent[0, :, frames - length :] = reference[:, -length:]
    return condition(latent, [kind])


def restore(sample: Tensor, given: Tensor) -> Tensor:
    """The sample [B,C,t,h,w] with the given latents of a condition [B,C+1,t,h,w] written over it, untouched."""
    return torch.where(given[:, :1] > 0, given[:, 1:].to(sample.dtype), sample)
