"""Training from clip files: frames are encoded on the device that trains, in front of the objective.

What a step learns from is what it would learn from latents of the same frames; but every epoch sees other spans of a
clip, and nothing has to be encoded before. Letters: B batch, C latent channels, t h w latent grid, T frames, H W
pixels.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ml.batching.buckets import Bucketing, Cell
from ml.batching.datasets import (
    CACHE_BYTES,
    DAMAGED,
    HEAD,
    NULL,
    TAIL,
    TEXT_PARTS,
    ClipBatch,
    ClipBatches,
    ClipDataset,
    LatentBatch,
    LatentDataset,
    as_video,
)
from ml.batching.encoding import Encoder, captions_of, together
from ml.batching.sampler import Batch
from ml.engines.protocol import Engine
from ml.models.autoencoders.autoencoder import VideoAutoencoder
from ml.models.inputs import Text
from ml.models.text import TextEncoder
from ml.recipe import Recipe
from ml.sections import Stage
from ml.training.step import Loss, Objective

# Embedded captions that a rank keeps: about 250 of T5 XXL's, all of a small recipe's.
TEXT_BYTES = 2 << 30


@dataclass(frozen=True)
class Source:
    """Where a stage's batches come from: ids by bucket, how a batch is read, what an empty prompt is, and what stands
    between the objective and what was read.

    `load` may be sent to worker processes.
    """

    groups: Mapping[Cell, list[str]]
    load: Callable[[Batch], Any]
    null: Text
    wrap: Callable[[Objective[LatentBatch]], Objective[Any]]


def latent_source(latents: LatentDataset, stage: Stage) -> Source:
    """Latents that were encoded before."""
    return Source(latents.groups("train", stage.name), latents.of_batch, latents.null, lambda objective: objective)


def online_source(
    recipe: Recipe, stage: Stage, clips: ClipDataset, seed: int, autoencoder: VideoAutoencoder, text: TextEncoder
) -> Source:
    """Clips, encoded while training by a frozen autoencoder and text encoder that stand on the device that trains."""
    batches = ClipBatches(clips, stage, seed)
    words = Words(text, captions_of(recipe, clips.clips, clips.bucketing))
    encoder = Encoder.of(recipe, autoencoder)
    return Source(batches.groups(), batches.load, words.of([NULL]), lambda objective: Online(objective, encoder, words))


def clip_dataset(recipe: Recipe, stage: Stage, folder: Path, workspace: Path) -> ClipDataset:
    """The clips of a dataset version as a stage reads them: by the rules of its latents, one cache for all workers."""
    bucketing = Bucketing(recipe.strides.pixels, recipe.dataset.fps_max, recipe.seed)
    return ClipDataset(folder, workspace, bucketing, CACHE_BYTES // max(1, stage.loading.workers))


class Words:
    """Embeddings of captions, each made when it is first needed; the latest used are kept on the CPU."""

    def __init__(self, encoder: TextEncoder, captions: Mapping[str, str], most: int = TEXT_BYTES) -> None:
        self.encoder, self.captions, self.most = encoder, {NULL: "", **captions}, most
        self._kept: OrderedDict[str, Text] = OrderedDict()
        self._bytes = 0

    def of(self, clip_ids: list[str]) -> Text:
        """The captions of clips [B,...], or the empty prompt (`NULL`)."""
        prompts = [self.captions[clip_id] for clip_id in clip_ids]
        texts = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
        missing = sorted({*prompts} - {*texts})
        if missing:
            texts |= dict(zip(missing, _rows(self.encoder.encode(missing)), strict=True))
        for prompt in dict.fromkeys(prompts):
            self._keep(prompt, texts[prompt])
        return Text(*(torch.cat([getattr(texts[prompt], part) for prompt in prompts]) for part in TEXT_PARTS))

    def _keep(self, prompt: str, text: Text) -> None:
        if prompt not in self._kept:
            self._kept[prompt] = text
            self._bytes += _size(text)
        self._kept.move_to_end(prompt)
        while self._bytes > self.most and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])


class Online(Objective[ClipBatch]):
    """Encodes clips and their captions, then has another objective make a loss of the latents."""

    def __init__(self, objective: Objective[LatentBatch], encoder: Encoder, words: Words) -> None:
        self.objective, self.encoder, self.words = objective, encoder, words

    def loss(self, engine: Engine, data: ClipBatch, generator: torch.Generator) -> Loss:
        """The loss of a batch of clips; nothing is random here, so the generator is the objective's alone."""
        return self.objective.loss(engine, self.encoded(data, engine.device), generator)

    def begin(self, step: int) -> None:
        """A step starts."""
        self.objective.begin(step)

    def save(self, folder: Path) -> None:
        """What the objective keeps."""
        self.objective.save(folder)

    def load(self, folder: Path) -> None:
        """Take it back."""
        self.objective.load(folder)

    def encoded(self, data: ClipBatch, device: torch.device) -> LatentBatch:
        """What `ml.encode` would have written of these frames, float32 on the device, texts on the CPU."""
        where = data.batch.position
        names = [f"{clip_id}/{data.batch.cell}/{where.epoch}/{where.index}" for clip_id in data.ids]
        most = together(data.frames.shape[1], data.batch.cell.size.area)
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(names), most):
            video = as_video(data.frames[start : start + most].to(device, non_blocking=True))
            for suffix, latents in self.encoder.encode(names[start : start + most], video).items():
                found.setdefault(suffix, []).append(latents)
        whole = {suffix: torch.cat(parts) for suffix, parts in found.items()}
        more = [whole.get(f"/{name}") for name in (HEAD, TAIL, DAMAGED)]
        return LatentBatch(whole[""], self.words.of(list(data.ids)), data.fps, data.batch.cell, *more)


def _rows(text: Text) -> list[Text]:
    """The texts of a batch, each a batch of one with memory of its own."""
    parts = [getattr(text, part) for part in TEXT_PARTS]
    return [Text(*(part[i : i + 1].clone() for part in parts)) for i in range(len(text.context))]


def _size(text: Text) -> int:
    return sum(getattr(text, part).nbytes for part in TEXT_PARTS)
