"""Held-out loss: the squared error of a transformer on clips it never saw, on a fixed grid of times and noise.

The same clips, times and noise for every network, so that differences are the network's. Letters: B batch, C latent
channels, t h w latent grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from ml.batching.buckets import Cell, uniform
from ml.batching.datasets import LatentBatch, LatentDataset
from ml.diffusion.process import Process
from ml.engines.protocol import Engine
from ml.manifest import stable_id
from ml.models.inputs import Denoiser, Inputs, denoise
from ml.models.networks import Network

Part = TypeVar("Part")
BATCH = 16


@dataclass(frozen=True)
class Grid:
    """What every network is measured on: keys by bucket, times in 0..1, the seed of the noise, and the process.

    `guidance` is what a guidance-distilled network is told. `sizes` are the batches of buckets, where they are not 16.
    """

    keys: Mapping[Cell, Sequence[str]]
    times: tuple[float, ...]
    seed: int
    process: Process
    guidance: float | None = None
    sizes: Mapping[Cell, int] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Asked:
    """A network that is measured: the module to call, which may wrap it, on which device and in which dtype.

    Of `size` groups of ranks this is number `rank`; `total` adds numbers over all ranks.
    """

    model: nn.Module
    network: Denoiser
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    size: int = 1
    total: Callable[[Sequence[float]], list[float]] = list

    @classmethod
    def of(cls, engine: Engine, network: Denoiser) -> "Asked":
        """The network that an engine trains, as it stands."""
        return cls(engine.model, network, engine.device, engine.dtype, engine.data_rank, engine.data_size, engine.total)

    def shares(self, parts: Sequence[Part]) -> Iterator[tuple[Part, bool]]:
        """This group's share of some work, as many parts as every other's; False for one that only keeps step."""
        for start in range(0, len(parts), self.size):
            yield parts[min(start + self.rank, len(parts) - 1)], start + self.rank < len(parts)


def held_out_loss(network: Network, latents: LatentDataset, grid: Grid, device: torch.device) -> HeldOut:
    """Mean squared error of what the network predicts (velocity or noise), with text and nothing given, in float32."""
    return measure(Asked(network, network, device), latents, grid)


@torch.no_grad()
def measure(asked: Asked, latents: LatentDataset, grid: Grid) -> HeldOut:
    """The same of a network that may be spread over ranks, which then must all call this; all get the result."""
    cells = list(grid.keys)
    parts = [(index, keys) for index, cell in enumerate(cells) for keys in _batches(grid, cell)]
    sums = torch.zeros(len(cells), len(grid.times), dtype=torch.float64)
    counts = torch.zeros(len(cells), dtype=torch.float64)
    for (index, keys), counted in asked.shares(parts):
        rows = _losses(asked, latents, keys, grid)
        if counted:
            sums[index] += rows.sum(0)
            counts[index] += len(rows)
    flat = torch.tensor(asked.total([*sums.flatten().tolist(), *counts.tolist()]), dtype=torch.float64)
    sums, counts = flat[: sums.numel()].view_as(sums), flat[sums.numel() :]
    by_timestep = sums.sum(0) / counts.sum()
    by_bucket = (sums.mean(1) / counts).tolist()
    return HeldOut(float(by_timestep.mean()), by_timestep.tolist(), dict(zip(map(str, cells), by_bucket, strict=True)))


def _batches(grid: Grid, cell: Cell) -> list[Sequence[str]]:
    """The keys of a bucket, as many together as its batch."""
    keys, size = grid.keys[cell], grid.sizes.get(cell, BATCH)
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def _losses(asked: Asked, latents: LatentDataset, keys: Sequence[str], grid: Grid) -> torch.Tensor:
    """A row for each key, a column for each time, float64."""
    batch, device = latents.load(keys), asked.device
    data, inputs = batch.latents.to(device), replace(_inputs(batch, asked), guidance=grid.guidance)
    columns = []
    for index, fraction in enumerate(grid.times):
        noise = torch.stack([_noise(data.shape[1:], grid.seed, key, index) for key in keys]).to(device)
        times = grid.process.at(fraction, len(keys), device)
        noisy = grid.process.noisy(data, noise, times).to(asked.dtype)
        output = denoise(asked.model, asked.network, noisy, grid.process.network_time(times), inputs)
        columns.append(grid.process.errors(output.float(), data, noise, times).double().cpu())
    return torch.stack(columns, 1)


def _inputs(batch: LatentBatch, asked: Asked) -> Inputs:
    """Text and geometry of a batch, nothing given."""
    text, size = batch.text.to(asked.device, asked.dtype), batch.cell.size
    return Inputs(text, size.height, size.width, batch.cell.frames, batch.fps.to(asked.device))


def _noise(shape: torch.Size, seed: int, key: str, index: int) -> torch.Tensor:
    """Noise of its own for every clip and time, the same for every network."""
    generator = torch.Generator().manual_seed(int(stable_id(seed, key, index)[:8], 16))
    return torch.randn(shape, generator=generator)
