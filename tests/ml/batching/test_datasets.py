import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ml.batching.buckets import Bucketing, Cell
from ml.batching.datasets import (
    AutoencoderClips,
    ClipBatches,
    ClipDataset,
    DatasetError,
    LatentDataset,
    batch_sizes,
    to_frames,
    to_video,
)
from ml.batching.sampler import Batch, Position
from ml.manifest import ManifestError
from ml.recipe import Recipe
from ml.shapes import Size

RULE = Bucketing(16, 12.0, 0)


def test_latents_are_grouped_by_shape_and_split(latents: Path, mini: Recipe) -> None:
    data = LatentDataset(latents)
    groups = data.groups("train", "stage1")
    assert {(cell.frames, len(keys)) for cell, keys in groups.items()} == {(1, 7), (5, 7)}
    assert {cell.frames: size for cell, size in batch_sizes(groups, mini.stage("stage1")).items()} == {1: 3, 5: 2}
    held_out = [key for keys in data.groups("holdout").values() for key in keys]
    assert {key.split("/")[0] for key in held_out} == {"clip2", "clip5", "clip9"}


def test_a_batch_of_latents_brings_its_captions_and_the_clips_ends(latents: Path, mini: Recipe) -> None:
    data = LatentDataset(latents)
    video = data.load(["clip1/48x80/48x80/5", "clip0/48x80/48x80/5"])
    assert video.latents.shape == (2, mini.autoencoder.latent_channels, 2, 6, 10)
    assert video.heads is not None
    assert video.tails is not None
    assert video.heads.shape == video.tails.shape == (2, mini.autoencoder.latent_channels, 1, 6, 10)
    assert not torch.equal(video.heads, video.tails)
    assert torch.equal(video.text.pooled[1], data.text(["clip0"]).pooled[0])
    assert video.text.context.shape == (2, mini.text.max_tokens, mini.text.context_dim)
    assert video.text.mask.sum(1).tolist() == [3, 2]
    still = data.load(["clip1/48x80/48x80/1"])
    assert still.heads is still.tails is None
    assert data.null.context.shape == (1, mini.text.max_tokens, mini.text.context_dim)
    assert data.null.mask.sum() == 1


def test_a_batch_says_what_it_was_in_pixels_frames_and_frames_a_second(latents: Path) -> None:
    batch = LatentDataset(latents).load(["clip1/48x80/48x80/5", "clip7/48x80/48x80/5"])
    assert batch.cell == Cell("48x80", 5, Size(48, 80))
    assert batch.fps.tolist() == pytest.approx([11.9, 11.3])


def test_a_network_that_is_told_of_no_pictures_finds_none(make_generation: Any, make_latents: Any) -> None:
    batch = LatentDataset(make_latents(make_generation("v1_1"))).load(["clip1/48x80/48x80/4"])
    assert batch.heads is batch.tails is None
    assert batch.latents.shape == (1, 4, 4, 6, 10)
    assert batch.text.pooled.shape == (1, 0)


def test_latents_of_another_stage_or_an_unfinished_folder_are_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no train latents for stage9"):
        LatentDataset(latents).groups("train", "stage9")
    with pytest.raises(ManifestError, match="has not finished"):
        LatentDataset(tmp_path)


def test_a_damaged_shard_is_named_with_the_key_and_the_step_to_make_again(latents: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    data = LatentDataset(folder)
    whole, key = data.load(["clip1/48x80/48x80/5"]), "clip1/48x80/48x80/5"
    raw = bytearray((folder / "latents-00000.safetensors").read_bytes())
    pattern = whole.latents[0].numpy().tobytes()
    raw[raw.find(pattern) + 10] ^= 4
    (folder / "latents-00000.safetensors").write_bytes(raw)
    with pytest.raises(DatasetError, match=rf"latents-00000\.safetensors, {key}: .*is damaged.*the step `latents`"):
        LatentDataset(folder).load(["clip1/48x80/48x80/5"])
    assert torch.equal(LatentDataset(folder).load(["clip0/48x80/48x80/5"]).fps, torch.tensor([12.0]))
    words = bytearray((folder / "text.safetensors").read_bytes())
    words[words.find(whole.text.context[0].numpy().tobytes())] ^= 1
    (folder / "text.safetensors").write_bytes(words)
    with pytest.raises(DatasetError, match=r"text\.safetensors, clip1: .*is damaged"):
        LatentDataset(folder).text(["clip1"])


def test_a_shard_of_another_encoding_is_found_out_by_the_table(latents: Path, tmp_path: Path) -> None:
    """A file that is whole in itself, but not the one that the table was written with."""
    folder = shutil.copytree(latents, tmp_path / "latents")
    table = pd.read_parquet(folder / "latents.parquet")
    table.loc[table["key"] == "clip1/48x80/48x80/5", "crc32"] ^= 1
    table.to_parquet(folder / "latents.parquet")
    with pytest.raises(DatasetError, match="clip1/48x80/48x80/5: the file is damaged"):
        LatentDataset(folder).load(["clip1/48x80/48x80/5"])


def test_latents_without_checksums_are_to_be_made_again(latents: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(latents, tmp_path / "latents")
    pd.read_parquet(folder / "latents.parquet").drop(columns="crc32").to_parquet(folder / "latents.parquet")
    with pytest.raises(DatasetError, match="have no checksums; make the step `latents` again"):
        LatentDataset(folder)


def test_datasets_go_to_another_process_without_files_and_frames(latents: Path, footage: Any) -> None:
    data = LatentDataset(latents)
    wanted = data.load(["clip1/48x80/48x80/5"])
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent.load(["clip1/48x80/48x80/5"]).latents, wanted.latents)
    clips = ClipDataset(footage.dataset, footage.workspace, RULE)
    empty = len(pickle.dumps(clips))
    clip_id = clips.of("train")[0].footage.clip_id
    frames = clips.read(clip_id, Size(48, 80), 4)
    assert len(pickle.dumps(clips)) == empty
    assert np.array_equal(pickle.loads(pickle.dumps(clips)).read(clip_id, Size(48, 80), 4), frames)


def test_a_stage_reads_clips_by_its_buckets(footage: Any, mini: Recipe) -> None:
    stage = mini.stage("stage1")
    clips = ClipBatches(ClipDataset(footage.dataset, footage.workspace, RULE), stage, 5)
    groups = clips.groups()
    assert {(str(cell), len(ids)) for cell, ids in groups.items()} == {("48x80/48x80/1", 6), ("48x80/48x80/5", 6)}
    for cell, ids in groups.items():
        batch = Batch(cell, tuple(ids[:2]), Position(0, 4))
        found = clips.load(batch)
        assert found.frames.shape == (2, cell.frames, 48, 80, 3)
        assert found.frames.dtype == torch.uint8
        assert (found.ids, found.fps.tolist(), found.batch) == (batch.ids, [12.0, 12.0], batch)


def test_clips_are_read_at_the_training_rate_and_shape(footage: Any) -> None:
    slow = ClipDataset(footage.dataset, footage.workspace, Bucketing(16, 6.0, 0))
    clip_id = slow.of("train")[0].footage.clip_id
    every_second = slow.read(clip_id, Size(48, 80), 4)
    all_frames = ClipDataset(footage.dataset, footage.workspace, RULE).read(clip_id, Size(48, 80), 7)
    assert np.array_equal(every_second, all_frames[::2])
    assert slow.still(clip_id, Size(48, 80)).shape == (1, 48, 80, 3)


def test_splits_and_tiers_choose_clips(footage: Any) -> None:
    data = ClipDataset(footage.dataset, footage.workspace, RULE)
    assert (len(data.of("train")), len(data.of("holdout")), len(data.of("train", "high"))) == (6, 2, 3)
    with pytest.raises(DatasetError, match="no train clip in tier rare"):
        data.of("train", "rare")


def test_autoencoder_batches_mix_images_in_by_their_share(footage: Any, mini: Recipe) -> None:
    stage = mini.autoencoder_stage("vae_stage1").model_copy(update={"image_fraction": 0.3})
    clips = AutoencoderClips(ClipDataset(footage.dataset, footage.workspace, RULE), stage, 5, (5,))
    ((cell, ids),) = clips.groups().items()
    assert (cell.size, cell.frames, len(ids)) == (Size(48, 80), 5, 6)
    batches = [Batch(cell, tuple(ids[:2]), Position(0, index)) for index in range(200)]
    videos = [clips.load(batch) for batch in batches]
    assert {video.shape for video in videos} == {(2, 3, 1, 48, 80), (2, 3, 5, 48, 80)}
    # Binomial: 0.3 +- 0.032 at 200 draws.
    assert 0.2 < sum(video.shape[2] == 1 for video in videos) / len(videos) < 0.4
    assert torch.equal(clips.load(batches[7]), videos[7])
    assert -1 <= min(float(v.min()) for v in videos) < max(float(v.max()) for v in videos) <= 1


def test_autoencoder_batches_are_of_any_length_where_the_stage_says_so(footage: Any, mini: Recipe) -> None:
    stage = mini.autoencoder_stage("vae_stage1").model_copy(update={"image_fraction": 0.0, "random_frames": True})
    clips = AutoencoderClips(ClipDataset(footage.dataset, footage.workspace, RULE), stage, 5, (2, 3, 4, 5))
    ((cell, ids),) = clips.groups().items()
    batches = [Batch(cell, tuple(ids[:1]), Position(0, index)) for index in range(200)]
    lengths = [clips.load(batch).shape[2] for batch in batches]
    assert set(lengths) == {2, 3, 4, 5}
    # Binomial: a quarter +- 0.031 at 200 draws.
    assert all(0.15 < lengths.count(frames) / 200 < 0.35 for frames in (2, 3, 4, 5))
    assert [clips.load(batch).shape[2] for batch in batches[:20]] == lengths[:20]


def test_an_autoencoder_stage_without_long_enough_clips_is_refused(footage: Any, mini: Recipe) -> None:
    stage = mini.autoencoder_stage("vae_stage1").model_copy(update={"frames": 33})
    clips = AutoencoderClips(ClipDataset(footage.dataset, footage.workspace, RULE), stage, 0, (33,))
    with pytest.raises(DatasetError, match="no train clip has 33 frames"):
        clips.groups()


def test_frames_survive_the_way_to_a_tensor_and_back() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    video = to_video([clip, clip])
    assert video.shape == (2, 3, 3, 4, 6)
    assert all(np.array_equal(back, clip) for back in to_frames(video))
    assert to_frames(torch.full((1, 3, 1, 2, 2), 1.7))[0].max() == 255
