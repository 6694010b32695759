"""Which frames a training sample is given, as each generation draws them, and what that means for its loss.

Letters: B batch, C latent channels, t h w latent grid. `mask` conditioning (1.1, 1.2) keeps given frames clean and
learns the others (MaskGenerator, ou/train_utils.py, 1.2); `embed` (1.3) shows given latents beside the noisy ones
(get_mask_index, ou/train_utils.py, 1.3); `channels` (2.0) adds them as channels (ou/train.py, main).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ml import processes
from ml.architectures import Conditioning
from ml.diffusion import conditions
from ml.diffusion.conditions import Kind
from ml.diffusion.means import given_weights

# Share of frames that kind `random` gives (MaskGenerator, 1.2).
RANDOM_SHARE = (0.1, 0.9)
# A stretch of given frames is this part of the clip at most.
LONGEST = 4


@dataclass(frozen=True)
class Ends:
    """First and last frames of a batch encoded alone, [B,C,1,h,w] each; None where the encoder wrote none."""

    heads: Tensor | None = None
    tails: Tensor | None = None


NO_ENDS = Ends()


@dataclass(frozen=True)
class Draw:
    """What a batch is given: fields of `Inputs`, loss weights [B,t], and samples whose text goes with it, [B] bool.

    None (and no indices) where a generation has no such thing.
    """

    condition: Tensor | None = None
    active: Tensor | None = None
    given: tuple[int, ...] = ()
    weights: Tensor | None = None
    drop_text: Tensor | None = None


class Conditioner:
    """Draws for one stage: the network's conditioning, the stage's kinds by weight, the recipe's objective."""

    def __init__(
        self,
        conditioning: Conditioning,
        kinds: Mapping[Kind, float],
        objective: processes.IDDPM | processes.RectifiedFlow,
        causal: bool = True,
    ) -> None:
        self.conditioning, self.kinds, self.objective, self.causal = conditioning, kinds, objective, causal

    def draw(self, latents: Tensor, generator: torch.Generator, ends: Ends = NO_ENDS) -> Draw:
        """For a batch of latents [B,C,t,h,w], on their device; a batch that is given nothing has an empty draw."""
        if self.conditioning == "none" or set(self.kinds) == {"t2v"}:
            return Draw()
        if self.conditioning == "mask":
            return self._mask(latents, generator)
        if self.conditioning == "embed":
            return self._embed(latents, generator, ends)
        drawn = conditions.draw(self.kinds, len(latents), generator)
        return Draw(condition=conditions.condition(latents, drawn, ends.heads, ends.tails, self.causal))

    def _mask(self, latents: Tensor, generator: torch.Generator) -> Draw:
        rows = [draw_mask(self.kinds, latents.shape[2], generator)[1] for _ in range(len(latents))]
        active = ~torch.stack(rows).to(latents.device)
        return Draw(active=active, weights=active.float())

    def _embed(self, latents: Tensor, generator: torch.Generator, ends: Ends) -> Draw:
        """One kind for the whole batch, as the network is told one list of frames; drops are drawn sample by sample."""
        kind, indices = draw_given(self.kinds, latents.shape[2], generator)
        if not indices or not isinstance(self.objective, processes.RectifiedFlow):
            return Draw()
        given = torch.zeros(len(latents), latents.shape[2], dtype=torch.bool, device=latents.device)
        given[:, list(indices)] = True
        shown = _with_pictures(latents, indices, ends) if kind.startswith("i2v") else latents
        if kind == "v2v_head_noisy":
            shown = _with_noise(latents, self.objective.condition_noise, generator)
        drop_text, drop_given = _drops(self.objective.drop_given, len(latents), generator)
        condition = conditions.Given(shown, 1 - given.to(latents.dtype), kind).condition
        condition[drop_given.to(latents.device), 1:] = 0
        return Draw(condition, None, indices, given_weights(given, self.objective.x_cond_weight), drop_text)


def draw_mask(weights: Mapping[Kind, float], latent_frames: int, generator: torch.Generator) -> tuple[Kind, Tensor]:
    """A kind of 1.1 and 1.2 by weight, and which frames [t] it gives; pictures are given nothing.

    Stretches (`quarter_*`) are 1 to t // 4 frames long, `image_*` one frame; `intepolate` gives every second frame,
    `random` a share of 0.1 to 0.9 of them. One frame at least is left to make: the last.
    """
    kind = conditions.draw(weights, 1, generator)[0]
    given = torch.zeros(latent_frames, dtype=torch.bool)
    if latent_frames <= 1 or kind == "t2v":
        return kind, given
    if kind == "random":
        low, high = RANDOM_SHARE
        share = low + (high - low) * _uniform(generator)
        given = torch.rand(latent_frames, generator=generator, device=generator.device).cpu() <= share
    elif kind == "intepolate":
        given[_integer(0, 1, generator) :: 2] = True
    else:
        length = _integer(1, max(1, latent_frames // LONGEST), generator) if kind.startswith("quarter") else 1
        where = kind.split("_", 1)[1]
        if where == "random":
            first = _integer(0, latent_frames - length, generator)
            given[first : first + length] = True
        given[:length] |= where.startswith("head")
        given[-length:] |= where.endswith("tail")
    if given.all():
        given[-1] = False
    return kind, given


def draw_given(
    weights: Mapping[Kind, float], latent_frames: int, generator: torch.Generator
) -> tuple[Kind, tuple[int, ...]]:
    """A kind of 1.3 by weight, and the indices of the frames that it gives; pictures are given nothing.

    v2v kinds give half of the latents, `other` a head or a tail of any length. One frame at least is left to make.
    """
    kind = conditions.draw(weights, 1, generator)[0]
    if latent_frames <= 1 or kind == "t2v":
        return kind, ()
    every = range(latent_frames)
    if kind in ("v2v_head", "v2v_head_noisy"):
        return kind, tuple(every[: latent_frames // 2])
    if kind == "v2v_tail":
        return kind, tuple(every[latent_frames // 2 :])
    if kind == "other":
        edge = _integer(1, max(1, latent_frames - 2), generator)
        return kind, tuple(every[:edge] if _integer(0, 1, generator) else every[edge:])
    head, tail = conditions.ends(kind, latent_frames)
    return kind, tuple(index for index in every if index < head or index >= latent_frames - tail)


def _drops(section: processes.DropGiven | None, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples [B] lose their text, and which their given latents."""
    if section is None:
        return torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    shares = torch.tensor([section.nothing, section.text, section.given, section.both], device=generator.device)
    drawn = torch.multinomial(shares, count, replacement=True, generator=generator).cpu()
    return (drawn == 1) | (drawn == 3), drawn >= 2


def _with_pictures(latents: Tensor, indices: tuple[int, ...], ends: Ends) -> Tensor:
    """Given first and last latents as pictures encoded alone, which is what a person gives at sampling time."""
    shown = latents.clone()
    if ends.heads is not None and 0 in indices:
        shown[:, :, :1] = ends.heads.to(latents)
    if ends.tails is not None and latents.shape[2] - 1 in indices:
        shown[:, :, -1:] = ends.tails.to(latents)
    return shown


def _with_noise(latents: Tensor, strengths: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(1 - s) x + s eps with one strength s of the range."""
    low, high = strengths
    strength = low + (high - low) * _uniform(generator)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents.device, latents.dtype)
    return (1 - strength) * latents + strength * noise


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, device=generator.device).item()


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=generator.device).item())
