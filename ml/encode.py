"""Encoding: `python -m ml.encode latents` turns clips into latents and their captions into embeddings.

Every clip is encoded once for each bucket that any stage puts it in; stages then train without the encoders. Shards
that a killed attempt finished are kept.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from infra.storage import atomic_write, sha256_of
from infra.workspace import Workspace
from ml.batching.buckets import Bucketing, Buckets, Cell
from ml.batching.datasets import NULL, REMEDY, TEXT_FILE, TEXT_PARTS, Clip, ClipDataset, to_video
from ml.batching.encoding import Encoder, captions_of, together
from ml.batching.shards import Shards, is_whole, write_shard
from ml.engines.make import device_of
from ml.entry import Call, parse
from ml.manifest import LATENTS, stable_id
from ml.models.text import TextEncoder, build_text_encoder
from ml.models.weights import WEIGHTS
from ml.recipe import Recipe
from ml.sections import Bucket
from ml.training.networks import open_autoencoder

Part = TypeVar("Part")
SHARD_ITEMS = 64
TEXT_BATCH = 16


class EncodeError(ValueError):
    """A dataset of which nothing can be encoded."""


@dataclass(frozen=True)
class Item:
    """One clip in one bucket, and the stages that train on it there."""

    clip: Clip
    cell: Cell
    stages: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name of the tensor: `clip_id/resolution/HxW/T`."""
        return f"{self.clip.footage.clip_id}/{self.cell}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one call."""
    call = parse(argv, ("latents",), "Encode clips to latents and captions to embeddings.")
    encode_latents(call)
    return 0


def encode_latents(call: Call) -> None:
    """Write `latents.parquet`, its shards, `text.safetensors` and `encoders.json`."""
    recipe, device = call.recipe, device_of(call.recipe.compute.encode)
    bucketing = Bucketing(recipe.strides.pixels, recipe.dataset.fps_max, recipe.seed)
    # No cache: shards go bucket by bucket, so a clip comes back only after all others have been read.
    clips = ClipDataset(call.input("dataset"), call.workspace, bucketing, cache_bytes=0)
    items = plan_items(recipe, clips)
    autoencoder = open_autoencoder(recipe, call.input("autoencoder")).to(device)
    digest = sha256_of(call.input("autoencoder") / WEIGHTS)[:16]
    encoder = Encoder.of(recipe, autoencoder)
    rows = encode_shards(call, items, clips, encoder, encoder.content(digest))
    text = build_text_encoder(recipe.text, Workspace(call.workspace).cache / "text", str(device))
    encode_text(call.out / TEXT_FILE, text, captions_of(recipe, clips_of(items), bucketing))
    encoders: dict[str, dict[str, object]] = {
        "autoencoder": {"kind": recipe.autoencoder.kind, "digest": digest, "latent": autoencoder.latent.model_dump()},
        "text": {"kind": recipe.text.kind, "digest": text.digest},
    }
    atomic_write(call.out / "encoders.json", json.dumps(encoders, indent=2, sort_keys=True))
    LATENTS.write(rows, call.out)
    report(call, rows, clips, encoders)


def plan_items(recipe: Recipe, clips: ClipDataset) -> list[Item]:
    """Every (clip, bucket) pair of any stage, once, sorted by bucket; held-out clips are of every stage's tier.

    Raises EncodeError when there is none.
    """
    found: dict[str, Item] = {}
    for clip in clips.clips.values():
        for name, tier, buckets in _wanted(recipe):
            if clip.split == "train" and tier not in clip.tiers:
                continue
            for cell in clips.bucketing.cells(clip.footage, buckets):
                item = Item(clip, cell, (name,))
                before = found[item.key].stages if item.key in found else ()
                found[item.key] = Item(clip, cell, (*before, name))
    if not found:
        raise EncodeError(
            f"none of {len(clips.clips)} clips fits a bucket of any stage: too small, too short, or no tier"
        )
    return sorted(found.values(), key=lambda item: (item.cell, item.key))


def _wanted(recipe: Recipe) -> list[tuple[str, str | None, Buckets]]:
    """Name, tier and buckets of every stage; without one, held-out clips alone, at the size and length of samples."""
    if recipe.stages:
        return [(stage.name, stage.tier, stage.buckets) for stage in recipe.stages]
    return [("pretrained", None, {recipe.sampling.resolution: {recipe.sampling.frames: Bucket(keep=1.0, batch=1)}})]


def encode_shards(
    call: Call, items: Sequence[Item], clips: ClipDataset, encoder: Encoder, content: str
) -> pd.DataFrame:
    """Encode item by item into shards of `SHARD_ITEMS`; returns the rows of the latents table."""
    rows, shards = [], Shards(call.out, REMEDY)
    with tqdm(total=len(items), desc="latents", unit="clip", mininterval=1.0) as bar:
        for number, shard in enumerate(parts(items, SHARD_ITEMS)):
            name = f"latents-{number:05d}.safetensors"
            wanted = stable_id(content, *(item.key for item in shard))
            if not is_whole(call.out / name, wanted):
                write_shard(call.out / name, dict(encode_items(shard, clips, encoder)), wanted)
            # The checksums of the file as it was written, not as it may be by now.
            sums = shards.sums(name)
            rows += [row_of(item, name, clips.bucketing.rate(item.clip.footage), sums[item.key]) for item in shard]
            bar.update(len(shard))
            call.log.heartbeat()
    return pd.DataFrame(rows)


def encode_items(
    items: Iterable[Item], clips: ClipDataset, encoder: Encoder
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """By key, latents [C,t,h,w] under the key, and what stands beside them under the key with a suffix."""
    device = next(encoder.autoencoder.parameters()).device
    for group in same_shape(items):
        cell = group[0].cell
        ids = [item.clip.footage.clip_id for item in group]
        if cell.frames == 1:
            video = to_video([clips.still(clip_id, cell.size) for clip_id in ids]).to(device)
        else:
            video = to_video([clips.read(clip_id, cell.size, cell.frames) for clip_id in ids]).to(device)
        found = {suffix: made.cpu() for suffix, made in encoder.encode([item.key for item in group], video).items()}
        for index, item in enumerate(group):
            yield item.key, {f"{item.key}{suffix}": made[index].contiguous().clone() for suffix, made in found.items()}


def clips_of(items: Iterable[Item]) -> dict[str, Clip]:
    """The clips of items, by id."""
    return {item.clip.footage.clip_id: item.clip for item in items}


def same_shape(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Neighbours of one bucket, no more than are encoded together."""
    group: list[Item] = []
    for item in items:
        most = together(item.cell.frames, item.cell.size.area)
        if group and (item.cell != group[0].cell or len(group) >= most):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def encode_text(path: Path, encoder: TextEncoder, captions: dict[str, str]) -> None:
    """Context, pooled vector and mask of every caption, by clip id, and of the empty prompt."""
    prompts = {NULL: "", **dict(sorted(captions.items()))}
    wanted = stable_id(encoder.digest, *prompts.items())
    if is_whole(path, wanted):
        return
    entries: dict[str, dict[str, Tensor]] = {}
    with tqdm(total=len(prompts), desc="text", unit="caption", mininterval=1.0) as bar:
        for part in parts(list(prompts), TEXT_BATCH):
            text = encoder.encode([prompts[name] for name in part])
            for index, name in enumerate(part):
                entries[name] = {f"{name}/{kind}": getattr(text, kind)[index].clone() for kind in TEXT_PARTS}
            bar.update(len(part))
    write_shard(path, entries, wanted)


def parts(items: Sequence[Part], size: int) -> list[Sequence[Part]]:
    """The items in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def row_of(item: Item, shard: str, fps: float, crc32: int) -> dict[str, object]:
    """The row of an item in the latents table."""
    return {
        "key": item.key,
        "clip_id": item.clip.footage.clip_id,
        "split": item.clip.split,
        "tiers": " ".join(item.clip.tiers),
        "resolution": item.cell.resolution,
        "height": item.cell.size.height,
        "width": item.cell.size.width,
        "frames": item.cell.frames,
        "fps": fps,
        "shard": shard,
        "crc32": crc32,
        "stages": " ".join(item.stages),
    }


def report(call: Call, rows: pd.DataFrame, clips: ClipDataset, encoders: dict[str, dict[str, object]]) -> None:
    """Write the result; clips that fell in no bucket are counted and named, never dropped in silence."""
    left_out = sorted(set(clips.clips) - set(rows["clip_id"]))
    buckets = rows.groupby(["resolution", "height", "width", "frames", "split"]).size()
    call.finish(
        metrics={
            "latents": float(len(rows)),
            "clips_encoded": float(rows["clip_id"].nunique()),
            "clips_without_bucket": float(len(left_out)),
            "holdout_latents": float((rows["split"] == "holdout").sum()),
        },
        facts={
            "encoders": encoders,
            "buckets": {f"{r}/{h}x{w}/{t} {split}": int(n) for (r, h, w, t, split), n in buckets.items()},
            "without_bucket": left_out[:50],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
