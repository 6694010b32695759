"""Guidance without idle rows against the three rows a step of the original: evaluations, equal results, time.

`python -m benchmarks.guidance_rows [--tiny]` samples with both from the same noise, through the house's own sampler and
through the rule as Open-Sora 2.0 writes it (ou/sampling.py, main): prompt, negative with the given latents, negative
without, whatever their weights. In float64 the two agree to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.common import arguments, console, table, time_both, times
from ml.diffusion import timesteps
from ml.diffusion.conditions import Given
from ml.diffusion.guidance import Call
from ml.diffusion.solver import Noise, Sampler
from ml.diffusion.timesteps import Shape
from ml.models.inputs import Inputs, Text, denoise
from ml.models.networks import Network, build_network
from ml.recipe import Recipe

Told = tuple[Inputs, Inputs, Given | None]
# Guidance is at full strength for this many steps, then on even steps only (ou/sampling.py, main).
FULL_STEPS = 10
ROWS_OF_THE_ORIGINAL = 3


@dataclass(frozen=True)
class Case:
    """A network, what it samples, and the grid (t, h, w) of its latent."""

    recipe: Recipe
    network: Network
    grid: tuple[int, int, int]
    kind: str


@dataclass(frozen=True)
class Measured:
    """Evaluations and seconds of both sides, their ratio in time, the largest difference of their samples, and the size
    (largest change of the noise) that the difference stands beside.
    """

    kind: str
    evaluations: tuple[int, int]
    seconds: tuple[float, float]
    ratio: float
    difference: float
    size: float


def measure(kind: str, tiny: bool, repeats: int) -> Measured:
    """Sample one kind both ways; 50 steps as released, also when tiny."""
    recipe = Recipe.load("v2_0", "tiny")
    paper = Recipe.load("v2_0", "paper").sampling
    guided = {name: getattr(paper, name) for name in ("steps", "guidance_text", "guidance_image", "oscillate", "ramp")}
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={**guided, "condition": kind})})
    case = Case(recipe, _network(recipe), (3, 4, 4) if tiny else (5, 8, 16), kind)
    sampler = Sampler(recipe.objective, recipe.sampling, _shape(case), kind)
    calls: list[int] = []
    prompt, null, given = _told(case)

    def ours() -> Tensor:
        return sampler.run(_counting(case, calls), _noise(case), prompt, null, given)

    def theirs() -> Tensor:
        return original(_counting(case, calls), case, (prompt, null, given), sampler.shift)

    samples, rows = [], []
    for work in (theirs, ours):
        calls.clear()
        samples.append(work())
        rows.append(sum(calls))
    pair = time_both(theirs, ours, repeats)
    difference = float((samples[0] - samples[1]).abs().max())
    size = float((samples[0] - _noise(case)()).abs().max())
    return Measured(kind, (rows[0], rows[1]), pair.seconds, pair.ratio, difference, size)


@torch.no_grad()
def original(
    call: Callable[[Tensor, Tensor, Inputs], Tensor],
    case: Case,
    told: tuple[Inputs, Inputs, Given | None],
    shift: float,
) -> Tensor:
    """A sample [1,C,t,h,w] by three rows a step: n + g_image (u - n) + g_text (p - u)."""
    prompt, null, given = told
    condition = None if given is None else given.condition
    nothing = None if condition is None else torch.zeros_like(condition)
    rows = [replace(prompt, condition=condition), replace(null, condition=condition), replace(null, condition=nothing)]
    sampling, x = case.recipe.sampling, _noise(case)()
    for index, (now, then) in enumerate(pairwise(timesteps.grid(sampling.steps, shift).tolist())):
        full = index < FULL_STEPS or index % 2 == 0
        image = torch.ones(case.grid[0], dtype=x.dtype)
        if full:
            top = 1 if given is None else sampling.guidance_image
            top += (1 - top) * index / sampling.steps
            image = torch.linspace(1, top, case.grid[0], dtype=x.dtype)
        times_now = torch.full((ROWS_OF_THE_ORIGINAL,), now, dtype=torch.float64).float()
        p, u, n = call(torch.cat([x] * ROWS_OF_THE_ORIGINAL), times_now, Inputs.stack(rows)).chunk(ROWS_OF_THE_ORIGINAL)
        text = sampling.guidance_text if full else 1.0
        x = x + (then - now) * (n + image[:, None, None] * (u - n) + text * (p - u))
    return x if condition is None else torch.where(condition[:, :1] > 0, condition[:, 1:], x)


def main() -> None:
    """Print evaluations, seconds, ratio and difference of text-to-video and image-to-video."""
    asked = arguments(__doc__ or "")
    rows = []
    for kind in ("t2v", "i2v_head"):
        found = measure(kind, asked.tiny, asked.repeats)
        counts, seconds = found.evaluations, found.seconds
        timed = [f"{seconds[0]:.3f}", f"{seconds[1]:.3f}", times(found.ratio)]
        rows.append([kind, *map(str, counts), times(counts[0] / counts[1]), *timed, f"{found.difference:.1e}"])
    heads = ["kind", "rows, original", "rows, ours", "fewer", "s, original", "s, ours", "faster", "largest difference"]
    note = "50 steps, text 7.5, image 3.0, oscillating; the tiny network of 2.0 with drawn weights, in float64, seed 0"
    console.print(table("Guidance without idle rows", heads, rows, note))


def _network(recipe: Recipe) -> Network:
    """Random weights everywhere: a fresh network is silent, and silence is equal to anything."""
    torch.manual_seed(0)
    network = build_network(recipe.network).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def _shape(case: Case) -> Shape:
    latents, height, width = case.grid
    return Shape(4 * latents - 3, 8 * height, 8 * width, latents, height * width // 4)


def _noise(case: Case) -> Callable[[], Tensor]:
    noise = Noise((case.recipe.autoencoder.latent_channels, *case.grid), [0])
    return lambda: noise().double()


def _told(case: Case) -> Told:
    """Prompt, negative prompt, and the first latent frame where the kind is given one."""
    generator, shape, text = torch.Generator().manual_seed(1), _shape(case), case.recipe.text
    inputs = []
    for _ in ("prompt", "negative"):
        context = torch.randn(1, text.max_tokens, text.context_dim, generator=generator).double()
        pooled = torch.randn(1, text.pooled_dim, generator=generator).double()
        told = Text(context, pooled, torch.ones(1, text.max_tokens, dtype=torch.bool))
        inputs.append(Inputs(told, shape.height, shape.width, shape.frames, torch.full((1,), 24.0)))
    if case.kind == "t2v":
        return inputs[0], inputs[1], None
    latent = torch.randn(1, case.recipe.autoencoder.latent_channels, *case.grid, generator=generator).double()
    mask = torch.ones(1, case.grid[0])
    mask[:, 0] = 0
    return inputs[0], inputs[1], Given(latent, mask, case.kind)


def _counting(case: Case, calls: list[int]) -> Call:
    """The network, writing down how many rows each call evaluates."""

    def call(x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        calls.append(len(x))
        return denoise(case.network, case.network, x, t, inputs)

    return call


if __name__ == "__main__":
    main()
