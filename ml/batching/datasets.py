"""What training reads: cached latents with their text for the transformer, clip files for the autoencoder.

Letters: B batch, C latent channels, t h w latent grid, T frames, H W pixels, S text tokens, D width, P pooled width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ml.batching.buckets import Bucketing, Cell, Footage, uniform
from ml.batching.sampler import Batch
from ml.batching.shards import DatasetError, Shards
from ml.batching.video import ClipCache, Frames, span
from ml.manifest import EXAMPLES, LATENTS, ManifestError
from ml.models.inputs import Text
from ml.sections import AutoencoderStage, Stage
from ml.shapes import Size, frame_interval

TEXT_FILE, TEXT_PARTS = "text.safetensors", ("context", "pooled", "mask")
NULL = "null"
# Suffixes of the tensors that hold a clip's first and last frame encoded alone, as a person gives them.
HEAD, TAIL = "head", "tail"
# Suffix of the latent of a damaged copy of the clip, which 1.3 learns to clean up.
DAMAGED = "damaged"
# Everything that a key may name, in the order of its checksum.
SUFFIXES = ("", f"/{HEAD}", f"/{TAIL}", f"/{DAMAGED}")
CACHE_BYTES = 1 << 30
REMEDY = "make the step `latents` again: remove its folder and run the walk"


@dataclass(frozen=True)
class LatentBatch:
    """Latents [B,C,t,h,w] of one shape, their captions, frame rates [B], and what they were in pixels and frames.

    `heads` and `tails` [B,C,1,h,w] are their first and last frames encoded alone; None for images, and for networks
    that are not told of them. `damaged` [B,C,t,h,w] are latents of damaged copies, where the recipe augments.
    """

    latents: Tensor
    text: Text
    fps: Tensor
    cell: Cell
    heads: Tensor | None = None
    tails: Tensor | None = None
    damaged: Tensor | None = None

    def pin_memory(self) -> "LatentBatch":
        """In page-locked memory, which a GPU copies from without waiting."""
        pinned = [None if one is None else one.pin_memory() for one in (self.heads, self.tails, self.damaged)]
        return LatentBatch(self.latents.pin_memory(), self.text.pin_memory(), self.fps.pin_memory(), self.cell, *pinned)


class LatentDataset:
    """The latents of one folder (`ml.encode latents`): rows of `latents.parquet`, tensors in its shards.

    A row is named by its key, `clip_id/resolution/HxW/T`. Raises ManifestError when the folder is not finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.rows = LATENTS.read(folder).set_index("key", drop=False)
        except ManifestError as error:
            if "crc32" not in str(error):
                raise
            raise DatasetError(f"the latents of {folder} have no checksums; {REMEDY}") from error
        self._shards = Shards(folder, REMEDY)

    @property
    def null(self) -> Text:
        """The empty prompt, as a batch of one."""
        return self.text([NULL])

    def groups(self, split: str, stage: str | None = None) -> dict[Cell, list[str]]:
        """Keys of a split in each bucket, of one stage or of all; raises DatasetError when there is none."""
        rows = self.rows[self.rows["split"] == split]
        if stage is not None:
            rows = rows[[stage in stages.split() for stages in rows["stages"]]]
        if rows.empty:
            raise DatasetError(
                f"{self.folder} holds no {split} latents for {stage or 'any stage'}: encode again with this recipe"
            )
        groups: dict[Cell, list[str]] = {}
        for row in rows.itertuples():
            groups.setdefault(_cell(row), []).append(row.key)
        return groups

    def of_batch(self, batch: Batch) -> LatentBatch:
        """The latents and captions of a batch of keys."""
        return self.load(batch.ids)

    def load(self, keys: Sequence[str]) -> LatentBatch:
        """The latents and captions of keys of one shape; raises DatasetError for a damaged shard."""
        found = [self._tensors(key) for key in keys]
        text = self.text([str(self.rows.at[key, "clip_id"]) for key in keys])
        fps = torch.tensor([float(self.rows.at[key, "fps"]) for key in keys])
        latents, *more = [_stacked(found, keys, suffix) for suffix in SUFFIXES]
        assert latents is not None
        return LatentBatch(latents, text, fps, _cell(self.rows.loc[keys[0]]), *more)

    def text(self, clip_ids: Sequence[str]) -> Text:
        """Text embeddings of the captions of clips."""
        found = [
            self._shards.read(TEXT_FILE, clip_id, [f"{clip_id}/{part}" for part in TEXT_PARTS]) for clip_id in clip_ids
        ]
        columns = zip(*(tensors.values() for tensors in found), strict=True)
        return Text(*(torch.stack(column) for column in columns))

    def _tensors(self, key: str) -> dict[str, Tensor]:
        row = self.rows.loc[key]
        return self._shards.read(row["shard"], key, [f"{key}{suffix}" for suffix in SUFFIXES], int(row["crc32"]))


@dataclass(frozen=True)
class Clip:
    """One example as a file: what must be known to read frames of it."""

    footage: Footage
    path: Path
    split: str
    tiers: tuple[str, ...]
    caption: str


class ClipDataset:
    """The examples of a dataset folder as clip files; decoded clips are kept in memory up to `cache_bytes`."""

    def __init__(self, folder: Path, workspace: Path, bucketing: Bucketing, cache_bytes: int = CACHE_BYTES) -> None:
        self.bucketing = bucketing
        self.clips = {clip.footage.clip_id: clip for clip in _clips(EXAMPLES.read(folder), workspace)}
        self._cache = ClipCache(cache_bytes)

    def of(self, split: str, tier: str | None = None) -> list[Clip]:
        """The clips of a split, in a tier or in all; raises DatasetError when there is none."""
        found = [c for c in self.clips.values() if c.split == split and (tier is None or tier in c.tiers)]
        if not found:
            raise DatasetError(f"the dataset has no {split} clip in {'tier ' + tier if tier else 'any tier'}")
        return found

    def read(self, clip_id: str, size: Size, frames: int, rng: np.random.Generator | None = None) -> Frames:
        """Frames [T,H,W,3] uint8 at the training frame rate: from the start, or a random span when `rng` is given."""
        footage = self.clips[clip_id].footage
        interval = frame_interval(footage.fps, self.bucketing.fps_max)
        return self._read(clip_id, size, span(footage.num_frames, frames, interval, rng))

    def still(self, clip_id: str, size: Size) -> Frames:
        """The middle frame, [1,H,W,3] uint8: the picture that a clip gives to the 1-frame buckets."""
        return self._read(clip_id, size, [self.clips[clip_id].footage.num_frames // 2])

    def _read(self, clip_id: str, size: Size, indices: list[int]) -> Frames:
        clip = self.clips[clip_id]
        return self._cache.read(clip.path, clip.footage.num_frames, indices, size)


class AutoencoderClips:
    """Batches of random spans (or single frames) of training clips for an autoencoder stage.

    A batch is images with probability `image_fraction`, decided by the seed and the batch's position; where the stage
    draws lengths, clips are as long as any of `lengths`.
    """

    def __init__(self, clips: ClipDataset, stage: AutoencoderStage, seed: int, lengths: Sequence[int]) -> None:
        self.clips, self.stage, self.seed, self.lengths = clips, stage, seed, lengths

    def groups(self, split: str = "train") -> dict[Cell, list[str]]:
        """Clips with enough pixels and frames, by size; raises DatasetError when there is none."""
        groups: dict[Cell, list[str]] = {}
        rule, stage = self.clips.bucketing, self.stage
        for clip in self.clips.of(split, stage.tier if split == "train" else None):
            footage = clip.footage
            if rule.holds(footage, stage.resolution, stage.frames):
                cell = Cell(stage.resolution, stage.frames, rule.size(footage, stage.resolution))
                groups.setdefault(cell, []).append(footage.clip_id)
        if not groups:
            raise DatasetError(f"no {split} clip has {stage.frames} frames at {stage.resolution}, as {stage.name} asks")
        return groups

    def load(self, batch: Batch) -> Tensor:
        """Video [B,3,T,H,W] in [-1, 1]; T is 1 for a batch of images."""
        where = (self.seed, batch.position.epoch, batch.position.index)
        image = uniform("image", *where) < self.stage.image_fraction
        frames = 1 if image else self._length(where, batch.cell.frames)
        rng = np.random.default_rng(where)
        return to_video([self.clips.read(clip_id, batch.cell.size, frames, rng) for clip_id in batch.ids])

    def _length(self, where: tuple[int, ...], frames: int) -> int:
        if not self.stage.random_frames:
            return frames
        return self.lengths[int(uniform("length", *where) * len(self.lengths))]


@dataclass(frozen=True)
class ClipBatch:
    """Clips as they were decoded: frames [B,T,H,W,3] uint8, ids, frame rates [B], and the batch that they are."""

    frames: Tensor
    ids: tuple[str, ...]
    fps: Tensor
    batch: Batch

    def pin_memory(self) -> "ClipBatch":
        """In page-locked memory, which a GPU copies from without waiting."""
        return ClipBatch(self.frames.pin_memory(), self.ids, self.fps.pin_memory(), self.batch)


class ClipBatches:
    """Batches of random spans of training clips for a transformer stage, which encodes them while it trains.

    Spans are drawn from the seed and the batch's position, so that every epoch sees others; a picture is any frame.
    """

    def __init__(self, clips: ClipDataset, stage: Stage, seed: int) -> None:
        self.clips, self.stage, self.seed = clips, stage, seed

    def groups(self) -> dict[Cell, list[str]]:
        """Clips in each bucket, by the rules that `ml.encode` follows; raises DatasetError when there is none."""
        groups: dict[Cell, list[str]] = {}
        for clip in self.clips.of("train", self.stage.tier):
            for cell in self.clips.bucketing.cells(clip.footage, self.stage.buckets):
                groups.setdefault(cell, []).append(clip.footage.clip_id)
        if not groups:
            raise DatasetError(f"no train clip fits a bucket of {self.stage.name}: too small, too short, or no tier")
        return groups

    def load(self, batch: Batch) -> ClipBatch:
        """The frames of a batch of clips."""
        rng = np.random.default_rng((self.seed, batch.position.epoch, batch.position.index))
        size, frames = batch.cell.size, batch.cell.frames
        read = [self.clips.read(clip_id, size, frames, rng) for clip_id in batch.ids]
        fps = [self.clips.bucketing.rate(self.clips.clips[clip_id].footage) for clip_id in batch.ids]
        return ClipBatch(torch.from_numpy(np.stack(read)), batch.ids, torch.tensor(fps), batch)


def to_video(clips: Sequence[Frames]) -> Tensor:
    """uint8 frames [T,H,W,3] of several clips to one video tensor [B,3,T,H,W] in [-1, 1]."""
    return as_video(torch.from_numpy(np.stack(clips)))


def as_video(frames: Tensor) -> Tensor:
    """uint8 frames [B,T,H,W,3] to video [B,3,T,H,W] in [-1, 1], on the same device."""
    return frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0).contiguous()


def to_frames(video: Tensor) -> list[Frames]:
    """The inverse of `to_video`, clamped and rounded: one array [T,H,W,3] per clip."""
    scaled = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy())


def batch_sizes(groups: Mapping[Cell, Sequence[str]], stage: Stage) -> dict[Cell, int]:
    """The recipe's batch size of every bucket."""
    return {cell: stage.buckets[cell.resolution][cell.frames].batch for cell in groups}


def _stacked(found: Sequence[Mapping[str, Tensor]], keys: Sequence[str], suffix: str) -> Tensor | None:
    """One kind of tensor of all keys [B,...]; None where the first has none."""
    if f"{keys[0]}{suffix}" not in found[0]:
        return None
    return torch.stack([tensors[f"{key}{suffix}"] for key, tensors in zip(keys, found, strict=True)])


def _cell(row: Any) -> Cell:
    """Bucket of a row of the latents table."""
    return Cell(str(row.resolution), int(row.frames), Size(int(row.height), int(row.width)))


def _clips(rows: pd.DataFrame, workspace: Path) -> Iterator[Clip]:
    for row in rows.itertuples():
        footage = Footage(row.clip_id, Size(row.height, row.width), row.num_frames, row.fps)
        yield Clip(footage, workspace / row.path, row.split, tuple(row.tiers.split()), row.caption)
