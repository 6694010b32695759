"""Held-out loss: the squared error of a transformer on clips it never saw, on a fixed grid of times and noise.

The same clips, times and noise for every network, so that differences are the network's. Letters: B batch, C latent
channels, t h w latent grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ml.batching.buckets import Cell, uniform
from ml.batching.datasets import LatentBatch, LatentDataset
from ml.diffusion.process import Process
from ml.manifest import stable_id
from ml.models.inputs import Inputs, denoise
from ml.models.networks import Network

BATCH = 16


@dataclass(frozen=True)
class Grid:
    """What every network is measured on: keys by bucket, times in 0..1, the seed of the noise, and the process.

    `guidance` is what a guidance-distilled network is told.
    """

    keys: Mapping[Cell, Sequence[str]]
    times: tuple[float, ...]
    seed: int
    process: Process
    guidance: float | None = None

    @property
    def num_latents(self) -> int:
        """Clips in buckets, all buckets together."""
        return sum(map(len, self.keys.values()))


@dataclass(frozen=True)
class HeldOut:
    """Mean losses of one network: over everything, for each time, for each bucket."""

    mean: float
    by_timestep: list[float]
    by_bucket: dict[str, float]


def even_times(number: int) -> tuple[float, ...]:
    """The middles of `number` equal parts of 0..1, so that no part of the flow weighs more than another."""
    return tuple((index + 0.5) / number for index in range(number))


def chosen_clips(keys: Mapping[Cell, Sequence[str]], number: int, seed: int) -> dict[Cell, list[str]]:
    """All buckets of at most `number` clips (the first part of a key), picked by the seed."""
    clips = sorted({key.split("/")[0] for found in keys.values() for key in found}, key=lambda c: uniform(seed, c))
    wanted = set(clips[:number])
    kept = {cell: [key for key in found if key.split("/")[0] in wanted] for cell, found in keys.items()}
    return {cell: found for cell, found in kept.items() if found}


@torch.inference_mode()
def held_out_loss(network: Network, latents: LatentDataset, grid: Grid, device: torch.device) -> HeldOut:
    """Mean squared error of what the network predicts (velocity or noise), with text and nothing given, in float32."""
    table: dict[str, list[list[float]]] = {}
    for cell, keys in grid.keys.items():
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            table.setdefault(str(cell), []).extend(_losses(network, latents, part, grid, device))
    rows = torch.tensor([row for found in table.values() for row in found], dtype=torch.float64)
    by_bucket = {name: float(torch.tensor(found, dtype=torch.float64).mean()) for name, found in table.items()}
    return HeldOut(float(rows.mean()), rows.mean(0).tolist(), by_bucket)


def _losses(
    network: Network, latents: LatentDataset, keys: Sequence[str], grid: Grid, device: torch.device
) -> list[list[float]]:
    """A row for each key, a column for each time."""
    batch = latents.load(keys)
    data, inputs = batch.latents.to(device), replace(_inputs(batch, device), guidance=grid.guidance)
    columns = []
    for index, fraction in enumerate(grid.times):
        noise = torch.stack([_noise(data.shape[1:], grid.seed, key, index) for key in keys]).to(device)
        times = grid.process.at(fraction, len(keys), device)
        noisy = grid.process.noisy(data, noise, times)
        output = denoise(network, network, noisy, grid.process.network_time(times), inputs)
        columns.append(grid.process.errors(output.float(), data, noise, times).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def _inputs(batch: LatentBatch, device: torch.device) -> Inputs:
    """Text and geometry of a batch, nothing given."""
    text, size = batch.text.to(device, torch.float32), batch.cell.size
    return Inputs(text, size.height, size.width, batch.cell.frames, batch.fps.to(device))


def _noise(shape: torch.Size, seed: int, key: str, index: int) -> torch.Tensor:
    """Noise of its own for every clip and time, the same for every network."""
    generator = torch.Generator().manual_seed(int(stable_id(seed, key, index)[:8], 16))
    return torch.randn(shape, generator=generator)
