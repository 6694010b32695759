"""From a request to clips: text, references and noise through the networks of a recipe, in every mode it knows.

Letters: B clips (seeds), C latent channels, t h w latent grid, T frames, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ml.batching.datasets import to_frames
from ml.batching.video import Frames
from ml.diffusion import guidance, mask_strategy, solver
from ml.diffusion.conditions import Given, Kind
from ml.diffusion.timesteps import Shape
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.inputs import Inputs, Text, denoise
from ml.models.networks import Network
from ml.models.text import TextEncoder
from ml.recipe import Recipe
from ml.sampling.references import encode_reference, encode_video, given_by_kind, given_by_strategy
from ml.sampling.requests import Request, RequestError
from ml.score_text import with_scores
from ml.shapes import Size, size_of


@dataclass(frozen=True)
class Networks:
    """What a generator drives: transformer, autoencoder, text encoder; the first two on one device."""

    transformer: Network
    autoencoder: VideoAutoencoder
    text: TextEncoder


class Generator:
    """Clips of one recipe's size and length; the same seed gives the same clip whatever seeds stand beside it."""

    def __init__(self, recipe: Recipe, networks: Networks) -> None:
        self.recipe, self.networks, self.sampling = recipe, networks, recipe.sampling
        self.size = sample_size(recipe)
        self.grid = networks.autoencoder.latent_shape(self.sampling.frames, self.size.height, self.size.width)
        self.device = next(networks.transformer.parameters()).device

    @cached_property
    def plan(self) -> solver.Sampler:
        """The plan of the recipe's own kind, for its figures."""
        return self._sampler(self.sampling.condition)

    @torch.inference_mode()
    def videos(self, request: Request, seeds: Sequence[int]) -> list[Frames]:
        """One clip [T,H,W,3] uint8 for each seed.

        Raises RequestError when the network takes no such references or they are longer than the clip,
        MaskStrategyError for a strategy that cannot be followed, ValueError for references that are too few or short.
        """
        placements = self._placements(request)
        references = [self._reference(path, number, placements) for number, path in enumerate(request.references)]
        own = [list(references) for _ in seeds]
        fresh = solver.Noise(self.grid, seeds, self.device)
        film: Tensor | None = None
        for loop in range(self.sampling.loops):
            if film is not None and self.shared_frames:
                placements = (*placements, self._continue(own, film, loop))
            given = self._given(request, own, placements, loop)
            kind = given.kind if given is not None else "t2v"
            text = mask_strategy.loop_prompt(request.prompt, loop)
            latents = self._sampler(kind).run(self._call, fresh, *self._inputs(text, len(seeds)), given)
            clip = self.networks.autoencoder.decode(latents, self.sampling.frames).cpu()
            film = clip if film is None else torch.cat([film, clip[:, :, self.shared_frames :]], dim=2)
        assert film is not None  # loops count from 1
        return to_frames(film)

    @property
    def frames(self) -> int:
        """Frames of a film: of one clip, or of loops that share some."""
        return mask_strategy.loop_frames(self.sampling.frames, self.sampling.loops, self.shared_frames)

    @property
    def shared_frames(self) -> int:
        """Frames that a loop shares with the one before."""
        return self.networks.autoencoder.longest(self.sampling.loop_latents) if self.sampling.loop_latents else 0

    def _call(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        network = self.networks.transformer
        return denoise(network, network, x, t, inputs)

    def _sampler(self, kind: Kind) -> solver.Sampler:
        tokens = self.recipe.strides.tokens(self.size, 1)
        shape = Shape(self.sampling.frames, self.size.height, self.size.width, self.grid[1], tokens)
        # A guidance-distilled network is told the scale and needs no second row.
        alone = {} if self.recipe.told_guidance is None else {"guidance_text": 1.0, "guidance_image": 1.0}
        return solver.Sampler(self.recipe.objective, self.sampling.model_copy(update=alone), shape, kind)

    @property
    def _causal(self) -> bool:
        return self.recipe.autoencoder.law != "group"

    def _placements(self, request: Request) -> tuple[mask_strategy.Placement, ...]:
        conditioning, masks = self.recipe.model.conditioning, self._by_strategy(request)
        if conditioning in ("none", "mask") and request.condition not in (None, "t2v", "mask"):
            raise RequestError(f"{self.recipe.name} knows no condition {request.condition!r}: leave it out ({request})")
        if (request.mask_strategy or self.sampling.loops > 1) and not masks:
            raise RequestError(f"{self.recipe.name} takes no mask strategy and no loops: its network is told by kind")
        if masks and request.references and not request.mask_strategy:
            raise RequestError(
                f"{self.recipe.name} needs a mask strategy to place references: `0` starts from the first"
            )
        if conditioning == "none" and request.references:
            raise RequestError(f"{self.recipe.name} makes whole clips only: it takes no references")
        placements = mask_strategy.parse(request.mask_strategy)
        if masks:
            mask_strategy.check(placements, self.sampling.loops, len(request.references))
        return placements

    def _by_strategy(self, request: Request) -> bool:
        """Whether references are placed by a mask strategy: always in 1.1 and 1.2, by condition `mask` in 1.3."""
        conditioning, kind = self.recipe.model.conditioning, request.condition or self.sampling.condition
        return conditioning == "mask" or (conditioning == "embed" and kind == "mask")

    def _reference(self, path: Path, number: int, placements: Sequence[mask_strategy.Placement]) -> Tensor:
        """As much of a reference as can be used, and one latent more to tell that it is too long."""
        clip, align = self.grid[1], self.sampling.align
        used = mask_strategy.latents_used(placements, number, clip, align) if placements else clip + 1
        return encode_reference(path, self.size, self.recipe.strides, self.networks.autoencoder, used)

    def _continue(self, own: list[list[Tensor]], film: Tensor, loop: int) -> mask_strategy.Placement:
        """Let a loop start with the film's last latents, encoded again, as the original does (1.1, 1.2).

        The shared frames are encoded alone, so that what is given is exactly what the film ends with.
        """
        tail = encode_video(film[:, :, -self.shared_frames :], self.networks.autoencoder)
        for references, latent in zip(own, tail, strict=True):
            references.append(latent)
        return mask_strategy.continuation(len(own[0]) - 1, loop, self.sampling.loop_latents)

    def _given(
        self,
        request: Request,
        own: list[list[Tensor]],
        placements: Sequence[mask_strategy.Placement],
        loop: int,
    ) -> Given | None:
        if self.recipe.model.conditioning == "none" or self._by_strategy(request):
            return given_by_strategy(self.grid, own, placements, loop, self.sampling.align)
        kind = request.condition or self.sampling.condition
        if kind == "t2v":
            if request.references:
                raise RequestError(
                    f"references are given, but the kind is t2v: say which, such as i2v_head ({request})"
                )
            return None
        return given_by_kind(own[0], kind, self.grid[1:], self._causal)

    def _inputs(self, prompt: str, count: int) -> tuple[Inputs, Inputs]:
        """What the network is told of `count` clips with the prompt, and without it."""
        scored = with_scores(prompt, self.sampling.score, self.sampling.fps)
        own = self.networks.transformer.null_context
        text = self._text(scored)
        negative = self._text(self.sampling.negative_prompt) if self.sampling.negative_prompt or own is None else None
        inputs = Inputs(
            text=text.expand(count),
            height=self.size.height,
            width=self.size.width,
            frames=self.sampling.frames,
            fps=torch.full((count,), float(self.sampling.fps), device=self.device),
            guidance=self.recipe.told_guidance,
        )
        return inputs, replace(inputs, text=guidance.null_text(text, own, negative).expand(count))

    def _text(self, prompt: str) -> Text:
        return self.networks.text.encode([prompt]).to(self.device, torch.float32)


def sample_size(recipe: Recipe) -> Size:
    """The size of the sampling section's resolution that is nearest to its aspect; RequestError for an unknown one."""
    try:
        return size_of(recipe.sampling.resolution, recipe.strides.pixels, recipe.sampling.aspect)
    except ValueError as error:
        raise RequestError(f"sampling: {error}") from error
