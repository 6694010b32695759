"""Rectified flow at 30 steps against denoising diffusion at 100, on a checkerboard: one network, equal training.

`python -m benchmarks.fewer_steps [--tiny]` trains one small MLP with the process of 1.2 and a copy of it with that of
1.0 and 1.1, both built by `ml.diffusion`, then samples both with the house's own samplers and measures how far the
samples are from fresh data: the sliced Wasserstein distance (mean over directions of the 1-D distance). The floor is
the distance of two sets of data.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.common import arguments, console, table, times
from ml.diffusion.process import Process, build_process
from ml.diffusion.solver import Sampler
from ml.diffusion.timesteps import Shape
from ml.models.inputs import Inputs, Text
from ml.models.layers import timestep_embedding
from ml.processes import IDDPM, AreaShift, Objective, RectifiedFlow, Sampling

OBJECTIVES: dict[str, Objective] = {
    "DDPM": IDDPM(),
    "RF": RectifiedFlow(law="v1_2", shift=AreaShift(law="v1_2"), drop_context=0.1),
}
# (process, sampling steps) of the table; the published pair is the first two: 100 steps in 1.0, 30 in 1.2.
RUNS = [("DDPM", 100), ("RF", 30), ("RF", 20), ("DDPM", 30), ("RF", 10)]
# A picture of 512 px: its shift is 1, so times are trained and sampled as they are.
SHAPE = Shape(frames=1, height=512, width=512, latent_frames=1, tokens_per_frame=1)
SQUARES, FEATURES, DIRECTIONS = 4, 64, 128


@dataclass(frozen=True)
class Budget:
    """Training steps, batch and learning rate, width of the network, samples that are judged; equal for both sides."""

    steps: int = 8000
    batch: int = 512
    lr: float = 2e-3
    width: int = 192
    samples: int = 20_000


class Net(nn.Module):
    """An MLP of a point and its time that gives twice the channels, as the networks of 1.x do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [2 + FEATURES, width, width, width]
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Points x [B,2,1,1,1] at t [B] in 0..1000 -> [B,4,1,1,1]."""
        told = torch.cat([x.flatten(1), timestep_embedding(t, FEATURES, factor=1.0)], dim=1)
        out: Tensor = self.layers(told)
        return out[:, :, None, None, None]


def measure(budget: Budget, seed: int) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], float], float]:
    """Distances and sampling seconds of every run, and the floor, for one seed."""
    data = checkerboard(budget.samples, torch.Generator().manual_seed(seed + 1000))
    other = checkerboard(budget.samples, torch.Generator().manual_seed(seed + 2000))
    nets = {name: train(name, budget, seed) for name in OBJECTIVES}
    distances, seconds = {}, {}
    for name, steps in RUNS:
        started = time.perf_counter()
        made = sample(nets[name], name, steps, budget.samples, seed)
        seconds[name, steps] = time.perf_counter() - started
        distances[name, steps] = sliced_wasserstein(made, data)
    return distances, seconds, sliced_wasserstein(other, data)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Points [B,2] in -1..1, evenly on the dark squares of a 4 x 4 board."""
    columns = torch.randint(SQUARES, (count,), generator=generator)
    rows = 2 * torch.randint(SQUARES // 2, (count,), generator=generator) + columns % 2
    return (torch.stack([columns, rows], 1) + torch.rand(count, 2, generator=generator)) * 2 / SQUARES - 1


def train(name: str, budget: Budget, seed: int) -> Net:
    """The network after its budget, its learning rate gone to zero; both processes start from the same weights."""
    torch.manual_seed(seed)
    net, process = Net(budget.width), build_process(OBJECTIVES[name])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=budget.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    for _ in range(budget.steps):
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(_loss(net, process, budget.batch, generator))
        optimizer.step()
        schedule.step()
    return net.eval()


def sample(net: Net, name: str, steps: int, count: int, seed: int) -> Tensor:
    """Points [B,2] by the house's sampler: ancestral for diffusion, Euler for the flow; no guidance."""
    solver = "ddpm" if name == "DDPM" else "euler"
    section = {"steps": steps, "guidance_text": 1.0, "resolution": "512x512", "aspect": "1:1", "frames": 1, "fps": 24}
    sampler = Sampler(OBJECTIVES[name], Sampling.model_validate({"solver": solver, **section}), SHAPE)
    generator = torch.Generator().manual_seed(seed + 3000)
    text = Text(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.ones(count, 1, dtype=torch.bool))
    inputs = Inputs(text, SHAPE.height, SHAPE.width, SHAPE.frames, torch.full((count,), 24.0))
    made = sampler.run(
        lambda x, t, _: net(x.float(), t.float()),
        lambda: torch.randn(count, 2, 1, 1, 1, generator=generator),
        inputs,
        inputs,
    )
    return made.flatten(1).float()


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Mean over fixed directions of the 1-D Wasserstein distance of two sets [B,2] of equal size."""
    angles = torch.arange(DIRECTIONS) * torch.pi / DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def main() -> None:
    """Print distances of all runs over seeds, the floor, and steps and seconds against 100 steps of diffusion."""
    asked = arguments(__doc__ or "")
    budget = Budget(steps=50, batch=64, width=32, samples=500) if asked.tiny else Budget()
    found = [measure(budget, seed) for seed in range(2 if asked.tiny else asked.repeats)]
    rows = []
    for run in RUNS:
        distances, seconds = [each[0][run] for each in found], [each[1][run] for each in found]
        slower = statistics.median(each[1][RUNS[0]] / each[1][run] for each in found)
        worse = statistics.median(each[0][run] / each[0][RUNS[0]] for each in found)
        spread = f"{min(distances):.4f} to {max(distances):.4f}"
        timed = [times(RUNS[0][1] / run[1]), f"{statistics.median(seconds):.2f}", times(slower)]
        rows.append([f"{run[0]} at {run[1]}", f"{statistics.median(distances):.4f}", spread, times(worse), *timed])
    floors = [each[2] for each in found]
    rows.append(["two sets of data", f"{statistics.median(floors):.4f}", "", "", "", "", ""])
    heads = ["run", "distance", "over seeds", "of DDPM's", "fewer steps", "s", "faster"]
    note = (
        f"seeds 0 to {len(found) - 1}; medians; {budget.steps} training steps of {budget.batch} for each process, "
        f"{budget.samples} samples; published: 30 steps (1.2) for 100 (1.0), 3.3x fewer"
    )
    console.print(table("Fewer steps: sliced Wasserstein distance to a checkerboard", heads, rows, note))


def _loss(net: Net, process: Process, batch: int, generator: torch.Generator) -> Tensor:
    data = checkerboard(batch, generator)[:, :, None, None, None]
    noise = torch.randn(data.shape, generator=generator)
    when = process.draw(batch, SHAPE, generator)
    noisy = process.noisy(data, noise, when).float()
    return process.losses(net(noisy, process.network_time(when)), data, noise, when).mean()


if __name__ == "__main__":
    main()
