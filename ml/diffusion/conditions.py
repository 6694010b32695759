"""What the network is given of the clip it makes: nothing (t2v), first or last pictures (i2v), a stretch (v2v), edits.

Letters: B batch, C latent channels, t h w latent grid. A condition is [B,C+1,t,h,w]: the mask (1 = given), then the
latent where it is given and zero elsewhere. How kinds are drawn in training is in ml/diffusion/draws.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Kind = str

# Latents given at (head, tail) by a causal autoencoder: 1 for a picture, 9 for 33 frames, 17 for 65. Another gives 8
# for 32 and 16 for 64 (Open-Sora 2.0, ou/train.py and ou/inference.py, main).
GIVEN: dict[Kind, tuple[int, int]] = {
    "t2v": (0, 0),
    "i2v_head": (1, 0),
    "i2v_tail": (0, 1),
    "i2v_loop": (1, 1),
    "v2v_head": (9, 0),
    "v2v_tail": (0, 9),
    "v2v_head_easy": (17, 0),
    "v2v_tail_easy": (0, 17),
}
# What a clip too short for a kind gets: something must be left to make.
SHORTER: dict[Kind, Kind] = {
    "v2v_head_easy": "v2v_head",
    "v2v_tail_easy": "v2v_tail",
    "v2v_head": "i2v_head",
    "v2v_tail": "i2v_tail",
    "i2v_loop": "i2v_head",
    "i2v_head": "t2v",
    "i2v_tail": "t2v",
}


@dataclass(frozen=True)
class Given:
    """Latents that a person gives: [B,C,t,h,w], and for each frame [B,t] how much of it is made anew, 0..1.

    `mask` 0 keeps a frame, 1 makes it (its latent is not read); what lies between edits it (kind `mask`: 1.1, 1.2, and
    1.3 without a condition). Every other kind is told to the network, keeps or makes whole frames, and keeps the same
    ones for the whole batch.
    """

    latent: Tensor
    mask: Tensor
    kind: Kind

    @classmethod
    def of(cls, condition: Tensor, kind: Kind) -> "Given":
        """What a condition [B,C+1,t,h,w] gives, as `place` and `condition` build it."""
        return cls(condition[:, 1:], 1 - condition[:, 0, :, 0, 0], kind)

    def expand(self, count: int) -> "Given":
        """What one clip is given, for `count` of them; what a batch is given stays as it is."""
        sizes = self.latent.shape[1:]
        return Given(self.latent.expand(count, *sizes), self.mask.expand(count, -1), self.kind)

    @property
    def condition(self) -> Tensor:
        """The condition [B,C+1,t,h,w]; raises ValueError where frames are given by halves."""
        if not ((self.mask == 0) | (self.mask == 1)).all():
            raise ValueError(f"{self.kind} keeps or makes whole frames: only kind mask edits them")
        kept = (1 - self.mask.to(self.latent.dtype))[:, None, :, None, None]
        kept = kept.expand(-1, 1, -1, *self.latent.shape[3:])
        return torch.cat([kept, self.latent * kept], dim=1)

    @property
    def indices(self) -> tuple[int, ...]:
        """The frames that are kept; raises ValueError when they differ within the batch."""
        kept = self.mask == 0
        if not (kept == kept[:1]).all():
            raise ValueError("one batch gives the same frames of every sample")
        return tuple(kept[0].nonzero().flatten().tolist())


def given_latents(kind: Kind, causal: bool = True) -> tuple[int, int]:
    """Latents that a kind gives at (head, tail) of any clip; raises ValueError for one that has no fixed number."""
    if kind not in GIVEN:
        raise ValueError(f"{kind!r} gives no fixed number of latents; these do: {', '.join(GIVEN)}")
    head, tail = GIVEN[kind]
    if causal or kind.startswith(("t2v", "i2v")):
        return head, tail
    return max(0, head - 1), max(0, tail - 1)


def ends(kind: Kind, latent_frames: int, causal: bool = True) -> tuple[int, int]:
    """Latents given at (head, tail) of a clip, after `fitting`; raises ValueError for a kind that has no such ends."""
    return given_latents(fitting(kind, latent_frames, causal), causal)


def fitting(kind: Kind, latent_frames: int, causal: bool = True) -> Kind:
    """The kind itself, or the nearest one that leaves at least one latent frame to make: of training, where clips vary.

    Raises ValueError for a kind that gives no fixed number of latents.
    """
    while sum(given_latents(kind, causal)) >= max(latent_frames, 1):
        kind = SHORTER[kind]
    return kind


def draw(weights: Mapping[Kind, float], count: int, generator: torch.Generator) -> list[Kind]:
    """One kind a sample, by weight."""
    kinds = list(weights)
    shares = torch.tensor([float(weights[kind]) for kind in kinds], device=generator.device)
    return [kinds[i] for i in torch.multinomial(shares, count, replacement=True, generator=generator).tolist()]


def mask(kind: Kind, latent_frames: int, device: torch.device | str = "cpu", causal: bool = True) -> Tensor:
    """[t] with 1 where latents are given, after `fitting`."""
    head, tail = ends(kind, latent_frames, causal)
    index = torch.arange(latent_frames, device=device)
    return ((index < head) | (index >= latent_frames - tail)).float()


def condition(
    latent: Tensor, kinds: Sequence[Kind], heads: Tensor | None = None, tails: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Condition [B,C+1,t,h,w] of a batch of latents [B,C,t,h,w], one kind a sample.

    `heads` and `tails` [B,C,1,h,w] are the first and last frame encoded alone, which is what a person gives at sampling
    time; they stand for the first and last latent of i2v kinds. Without them those of the clip are given.
    """
    frames = latent.shape[2]
    masks = torch.stack([mask(kind, frames, latent.device, causal) for kind in kinds]).to(latent.dtype)
    given = latent.clone()
    lengths = [ends(kind, frames, causal) for kind in kinds]
    for picture, end, place_ in ((heads, 0, slice(0, 1)), (tails, 1, slice(-1, None))):
        if picture is not None:
            rows = [row for row, length in enumerate(lengths) if length[end] == 1]
            given[rows, :, place_] = picture[rows].to(latent.dtype)
    masks = masks[:, None, :, None, None].expand(-1, 1, -1, *latent.shape[3:])
    return torch.cat([masks, given * masks], dim=1)


def place(
    references: Sequence[Tensor], kind: Kind, grid: tuple[int, int, int], lengths: tuple[int, int] | None = None
) -> Tensor:
    """Condition [1,C+1,t,h,w] from encoded references [C,f,h,w]: the head's, then the tail's, as `kind` needs them.

    `lengths` are the latents given at (head, tail), as `given_latents` has them of a causal autoencoder when None (1.3
    gives as many as it likes). A reference longer than its place is cut: a head keeps its first latents, a tail its
    last. Raises ValueError when the number of references is wrong, or a reference is too short, or nothing would be
    left to make.
    """
    frames, height, width = grid
    head, tail = lengths or given_latents(kind)
    if head + tail >= frames > 0 and head + tail:
        raise ValueError(f"{kind} with {head} + {tail} given latents leaves nothing to make of {frames}")
    places = [(end, length) for end, length in (("head", head), ("tail", tail)) if length]
    if len(references) != len(places):
        raise ValueError(f"{kind} takes {len(places)} references, got {len(references)}")
    if not places:
        raise ValueError("t2v takes no condition: pass None to the network")
    latent = torch.zeros(1, references[0].shape[0], frames, height, width, dtype=references[0].dtype)
    masks = torch.ones(1, frames)
    for reference, (end, length) in zip(references, places, strict=True):
        if reference.shape[1] < length:
            raise ValueError(f"{kind} needs {length} latents at the {end}, the reference has {reference.shape[1]}")
        where = slice(0, length) if end == "head" else slice(frames - length, frames)
        latent[0, :, where] = reference[:, :length] if end == "head" else reference[:, -length:]
        masks[0, where] = 0
    return Given(latent, masks, kind).condition


def restore(sample: Tensor, given: Tensor) -> Tensor:
    """The sample [B,C,t,h,w] with the given latents of a condition [B,C+1,t,h,w] written over it, untouched."""
    return torch.where(given[:, :1] > 0, given[:, 1:].to(sample.dtype), sample)
