"""Videos of a network in the middle of its training: the real sampler, in few steps, at the size that is trained."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ml.batching.video import Frames
from ml.diffusion.mask_strategy import loop_prompt
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.inputs import Inputs, Text, denoise
from ml.models.networks import Network
from ml.models.text import TextEncoder
from ml.recipe import Recipe
from ml.sampling.generator import Generator, Networks
from ml.sampling.requests import Request
from ml.score_text import with_scores
from ml.sections import Stage
from ml.shapes import nominal_area
from ml.training.held_out import Asked


class Sampled:
    """Samples prompts as a stage's validation section says; see `ml.training.validation.Preview`.

    `text` embeds the prompts once, here, and is not kept. The autoencoder is on the device that trains.
    """

    def __init__(self, recipe: Recipe, stage: Stage, autoencoder: VideoAutoencoder, text: TextEncoder) -> None:
        if stage.validation is None:
            raise ValueError(f"stage {stage.name} has no validation section")
        resolution, frames = shape_of(stage, recipe.sampling.frames)
        few = {"steps": stage.validation.sampling_steps, "loops": 1, "resolution": resolution, "frames": frames}
        self.recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=few)})
        self.prompts, self.seed = stage.validation.prompts, recipe.evaluation.seeds[0]
        sampling = self.recipe.sampling
        said = [with_scores(loop_prompt(prompt, 0), sampling.score, sampling.fps) for prompt in self.prompts]
        self._text = Remembered(text, {*said, sampling.negative_prompt})
        self._autoencoder = autoencoder

    def __call__(self, asked: Asked, prompt: str) -> Frames:
        """A video [T,H,W,3] uint8; ranks that share the network's work must all call this."""
        network = asked.network
        assert isinstance(network, Network)
        return InTraining(self.recipe, Networks(network, self._autoencoder, self._text), asked).videos(
            Request(prompt), [self.seed]
        )[0]


class InTraining(Generator):
    """A generator whose transformer is called through whatever wraps it, in the precision that it trains in."""

    def __init__(self, recipe: Recipe, networks: Networks, asked: Asked) -> None:
        super().__init__(recipe, networks)
        self.asked = asked

    def _call(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        dtype = self.asked.dtype
        condition = None if inputs.condition is None else inputs.condition.to(dtype)
        told = replace(inputs, text=inputs.text.to(self.device, dtype), condition=condition)
        # What the network or its wrapper keeps from here must be fit for training: no tensors of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return denoise(self.asked.model, self.asked.network, x.to(dtype), t, told).float()


class Remembered:
    """A text encoder of a few prompts only, whose embeddings it holds."""

    def __init__(self, encoder: TextEncoder, prompts: Iterable[str]) -> None:
        self.digest = encoder.digest
        self._texts = {prompt: encoder.encode([prompt]) for prompt in sorted(prompts)}

    def encode(self, prompts: Sequence[str]) -> Text:
        """See `TextEncoder`; KeyError for another prompt."""
        texts = [self._texts[prompt] for prompt in prompts]
        return Text(*(torch.cat([getattr(text, name) for text in texts]) for name in ("context", "pooled", "mask")))


def shape_of(stage: Stage, longest: int) -> tuple[str, int]:
    """The largest resolution that a stage trains videos at, and its longest bucket of at most `longest` frames."""
    videos = {name: [t for t in buckets if t > 1] for name, buckets in stage.buckets.items()}
    chosen = {name: found for name, found in videos.items() if found} or {name: [1] for name in videos}
    resolution = max(chosen, key=nominal_area)
    lengths = chosen[resolution]
    return resolution, max((t for t in lengths if t <= longest), default=min(lengths))
