"""What is encoded of a clip, before training or during it: the video, what stands beside it, and its words.

Letters: B batch, C latent channels, t h w latent grid, T frames, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ml.batching.buckets import Bucketing
from ml.batching.datasets import DAMAGED, HEAD, TAIL, Clip
from ml.diffusion.augment import damage
from ml.manifest import stable_id
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.processes import Augmentation, RectifiedFlow, ScoreText
from ml.recipe import Recipe
from ml.score_text import with_scores

# Pixels (B T H W) that go through the encoder together: enough to keep cores busy, little enough for any GPU.
BATCH_PIXELS = 1 << 20
# 2.0's words without its motion score, which no clip here has.
FRAME_RATE = ScoreText(style="v2_0")


@dataclass(frozen=True)
class Encoder:
    """What encodes: the autoencoder, and what is encoded beside the clips themselves.

    `ends`: first and last frames alone, as a person gives them at sampling time. `augmentation`: a damaged copy, drawn
    from `seed` and the name it is given (1.3).
    """

    autoencoder: VideoAutoencoder
    ends: bool
    augmentation: Augmentation | None
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, autoencoder: VideoAutoencoder) -> "Encoder":
        """The encoder that a recipe's network and objective ask for."""
        ends = recipe.model.conditioning in ("channels", "embed")
        augmentation = recipe.objective.augmentation if isinstance(recipe.objective, RectifiedFlow) else None
        return cls(autoencoder, ends, augmentation, recipe.seed)

    def content(self, digest: str) -> str:
        """What decides the latents of a clip, beside the clip; `digest` is of the autoencoder's weights."""
        return stable_id(digest, self.ends, self.augmentation, self.seed if self.augmentation else "")

    def encode(self, names: Sequence[str], video: Tensor) -> dict[str, Tensor]:
        """Latents [B,C,t,h,w] of videos [B,3,T,H,W] by what they are: "", `/head` and `/tail` (t = 1), `/damaged`.

        One name for each video: what of it is damaged depends on the seed and the name. Nothing is differentiated.
        """
        with torch.no_grad():
            return {suffix: self.autoencoder.encode(part).float() for suffix, part in self._parts(names, video).items()}

    def _parts(self, names: Sequence[str], video: Tensor) -> dict[str, Tensor]:
        found = {"": video}
        if self.ends and video.shape[2] > 1:
            found |= {f"/{HEAD}": video[:, :, :1], f"/{TAIL}": video[:, :, -1:]}
        if self.augmentation is not None:
            generators = [torch.Generator().manual_seed(int(stable_id(self.seed, name)[:8], 16)) for name in names]
            copies = zip(video.chunk(len(video)), generators, strict=True)
            found[f"/{DAMAGED}"] = torch.cat([damage(clip, self.augmentation, draws) for clip, draws in copies])
        return found


def together(frames: int, area: int) -> int:
    """How many clips of T frames and H x W pixels are encoded together."""
    return max(1, BATCH_PIXELS // (frames * area))


def captions_of(recipe: Recipe, clips: Mapping[str, Clip], bucketing: Bucketing) -> dict[str, str]:
    """What is embedded of every clip, by its id: its caption, in 2.0 with its frame rate, as prompts are written.

    Rates are whole numbers (24 for 23.976): a prompt asks for no other. A clip's images share its words.
    """
    if recipe.sampling.score.style != "v2_0":
        return {clip_id: clip.caption for clip_id, clip in clips.items()}
    rates = {clip_id: round(bucketing.rate(clip.footage)) for clip_id, clip in clips.items()}
    return {clip_id: with_scores(clip.caption, FRAME_RATE, rates[clip_id]) for clip_id, clip in clips.items()}
