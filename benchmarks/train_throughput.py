"""How fast the house trains: its own step (engine, objective, optimizer, stream) on synthetic latents.

    python -m benchmarks.train_throughput                          one row, sized for this machine
    python -m benchmarks.train_throughput --levers                 what each lever gives, alone and together
    python -m benchmarks.train_throughput --compare                beside the same step in plain torch modules (CPU)
    python -m benchmarks.train_throughput --gpu-table              everything for one H100 or H200 (8 minutes, untried)

On a GPU the slice of 2.0 is 2 double and 4 single blocks of 19 and 38 at full width in bf16, so that weights, masters
and moments (25 GB) leave room for what is measured; on a CPU it is small and in fp32. Model FLOPs and the estimate for
the whole network are those of its blocks (`ml/counts.py`), tokens are visual ones. Rows are printed as they are made.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.common import console, table, time_both, times
from benchmarks.plain_mmdit import PlainMMDiT, PlainStep
from benchmarks.real_step import ADAM, SEED, Case, Measured, RealStep, accelerator, measure, section_of
from ml.architectures import MMDiT
from ml.methods import Engine
from ml.processes import RectifiedFlow
from ml.recipe import Recipe
from ml.training.optim import step_generator
from ml.training.step import shape_of

# Share of the peak, and visual tokens a second a GPU of the whole network at 256px: what one H100 or H200 should reach.
# The published runs had 0.15 and 2,700 (arXiv 2503.09642: 85,000 steps of 224 GPUs in 2,240 GPU-days).
TARGET_UTILISATION, TARGET_TOKENS = 0.45, 6500.0
HOPPER = ("H100", "H200")
HEADS = ("what", "s/step", "tokens/s/GPU", "TFLOP/s", "MFU", "peak GB", "waits", "whole: tokens/s", "faster")


@dataclass(frozen=True)
class Lever:
    """A row of the table: keys of the engine's section, and the kernel of attention (None = the house's choice)."""

    name: str
    over: dict[str, Any] = field(default_factory=dict)
    attention: SDPBackend | None = None


ALL_BLOCKS = {"checkpoint_blocks": (100, 100)}
BASE = Lever("eager, nothing recomputed")
LEVERS = (
    BASE,
    Lever("recompute: block", {**ALL_BLOCKS}),
    Lever("recompute: selective", {**ALL_BLOCKS, "recompute": "selective"}),
    Lever("recompute: block, offload", {**ALL_BLOCKS, "offload": True}),
    Lever("compile", {"compile": True}),
)
ON_CPU = (Lever("attention by its formula", attention=SDPBackend.MATH),)
ON_GPU = (
    Lever("attention by cuDNN", attention=SDPBackend.CUDNN_ATTENTION),
    Lever("fp8 (eager)", {"fp8": True}),
    Lever("compile + fp8", {"compile": True, "fp8": True}),
    Lever("compile + fp8 + selective", {"compile": True, "fp8": True, **ALL_BLOCKS, "recompute": "selective"}),
)
# At 768px compiling again would take the time that the other rows need.
ON_GPU_LARGE = (BASE, ON_GPU[0], LEVERS[1], LEVERS[2], LEVERS[3], ON_GPU[2])


def main(argv: Sequence[str] | None = None) -> None:
    """Print what is asked for."""
    asked = _arguments(argv)
    # Under torchrun every rank measures and the first one speaks.
    console.quiet = "RANK" in os.environ and os.environ["RANK"] != "0"
    if asked.gpu_table:
        gpu_table(asked.steps, asked.minutes)
        return
    case, over = case_of(asked), dict(_setting(text) for text in asked.set)
    if asked.compare:
        compare(case, section_of(over), asked.repeats)
        return
    levers = (*LEVERS, *(ON_GPU if torch.cuda.is_available() else ON_CPU)) if asked.levers else (BASE,)
    named = [
        Lever(lever.name if asked.levers else "as asked", {**over, **lever.over}, lever.attention) for lever in levers
    ]
    rows_of(case, named, asked.steps, time.monotonic() + 60 * asked.minutes)


def case_of(asked: argparse.Namespace) -> Case:
    """The case of a command line; what it leaves out fits the machine."""
    large = torch.cuda.is_available()
    recipe = Recipe.load(asked.recipe, asked.profile)
    blocks = asked.blocks or ((2, 4) if large else (1, 2)) if asked.profile == "paper" else asked.blocks
    heads = asked.heads or (None if large or asked.profile != "paper" else 2)
    frames = asked.frames or (129 if large else 5)
    return Case(recipe, asked.resolution, frames, asked.batch, blocks, heads)


def gpu_table(steps: int, minutes: float) -> None:
    """Both cases of 2.0 with all levers, until the time is up; refuses without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu-table needs a GPU, and torch sees none here")
    deadline, recipe = time.monotonic() + 60 * minutes, Recipe.load("v2_0", "paper")
    rows_of(Case(recipe, "256px", 129, 1, (2, 4)), (*LEVERS, *ON_GPU), steps, deadline)
    rows_of(Case(recipe, "768px", 33, 1, (2, 4)), ON_GPU_LARGE, steps, deadline)


def rows_of(case: Case, levers: Sequence[Lever], steps: int, deadline: float) -> None:
    """Measure and print the levers one by one, then as a table with the targets under it."""
    rows, base, best = [], None, None
    for lever in levers:
        if time.monotonic() > deadline:
            rows.append([lever.name, "no time left", *[""] * (len(HEADS) - 2)])
            continue
        try:
            found = measure(case, section_of(lever.over), steps, attention=lever.attention)
        except torch.OutOfMemoryError:
            rows.append([lever.name, "out of memory", *[""] * (len(HEADS) - 2)])
            continue
        base = base or found
        best = found if best is None or found.seconds < best.seconds else best
        rows.append(row(case, lever.name, found, base))
        console.print("  ".join(rows[-1]), style="dim", markup=False)
    console.print(table(title(case), HEADS, rows, note(case, steps)))
    if best is not None:
        console.print(verdict(case, best), markup=False)


def row(case: Case, name: str, found: Measured, base: Measured) -> list[str]:
    """The cells of one measurement; `faster` is against the first row."""
    share = "-" if found.utilisation is None else f"{found.utilisation:.1%}"
    whole = found.tokens_per_second / case.scale
    cells = [f"{found.seconds:.3f}", f"{found.tokens_per_second:,.0f}", f"{found.tflops:.3g}", share]
    cells += [
        f"{found.peak_bytes / 2**30:.1f}",
        f"{found.waited:.1%}",
        f"{whole:,.0f}" if whole >= 10 else f"{whole:.2g}",
    ]
    return [name, *cells, times(base.seconds / found.seconds)]


def title(case: Case) -> str:
    """What is trained, in a line."""
    model, width = case.network, case.network.hidden_size
    depth = f"{model.depth} + {model.depth_single_blocks}" if isinstance(model, MMDiT) else str(model.depth)
    return (
        f"{case.recipe.id}: {depth} blocks of width {width}, {model.num_heads} heads, {case.resolution} x "
        f"{case.frames} frames ({case.tokens:,} + {case.recipe.text.max_tokens} tokens), batch {case.batch}"
    )


def note(case: Case, steps: int) -> str:
    """How it was measured."""
    peak = "of the steps" if torch.cuda.is_available() else "of the process so far"
    return (
        f"mean of {steps} steps after 3; peak memory {peak}; the whole network is {case.scale:.1f}x the slice's FLOPs"
    )


def verdict(case: Case, best: Measured) -> str:
    """The targets beside the fastest row on the hardware that they are for; elsewhere that they say nothing."""
    targets = f"MFU >= {TARGET_UTILISATION:.0%} and (at 256px) >= {TARGET_TOKENS:,.0f} tokens/s per GPU"
    if accelerator() not in HOPPER or best.utilisation is None:
        return f"targets on an H100 or H200: {targets}; there is none here, so nothing is said of them"
    lines = [_met("MFU", best.utilisation, TARGET_UTILISATION, ".1%")]
    if case.resolution == "256px":
        lines.append(
            _met("tokens/s per GPU, whole network", best.tokens_per_second / case.scale, TARGET_TOKENS, ",.0f")
        )
    return "\n".join(lines)


def compare(case: Case, section: Engine, repeats: int) -> None:
    """Our step and the plain one on the same weights and batches, turn about; losses must agree step by step."""
    first, second = steps_of(case, section)
    losses: tuple[list[float], list[float]] = ([], [])
    with second as ours:
        pair = time_both(lambda: losses[0].append(first()), lambda: losses[1].append(ours().loss), repeats)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0.0)
    tokens = case.batch * case.tokens
    rows = [
        [name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", times(ratio), f"{last:.5f}"]
        for name, seconds, ratio, last in zip(
            ("plain torch", "the house"), pair.seconds, (1.0, pair.ratio), (found[-1] for found in losses), strict=True
        )
    ]
    said = f"{repeats} repeats, turn about; same weights, batches and noise; losses agree within 1e-4 at every step"
    console.print(table(title(case), ("step", "s", "tokens/s", "faster", "last loss"), rows, said))


class PlainRun:
    """Calling it takes one plain step on the next batch, with the noise that the house draws for it."""

    def __init__(self, case: Case, ours: RealStep, grad_clip: float) -> None:
        assert isinstance(case.network, MMDiT)
        assert isinstance(case.recipe.objective, RectifiedFlow)
        network = PlainMMDiT(case.network)
        network.load_state_dict(ours.network.state_dict())
        self.step, self.stream = PlainStep(network, ADAM, grad_clip), case.stream()
        self.process, self.strides, self.floor = ours.process, case.recipe.strides, case.recipe.objective.sigma_min

    def __call__(self) -> float:
        """The loss."""
        batch, data = self.stream.next()
        generator = step_generator(torch.device("cpu"), SEED, batch.position.epoch, batch.position.index)
        drawn = self.process.draw(len(data.latents), shape_of(data, self.strides), generator)
        noise = torch.randn(data.latents.shape, generator=generator)
        return self.step(data.latents, (data.text.context, data.text.pooled), drawn, noise, self.floor)


def steps_of(case: Case, section: Engine) -> tuple[PlainRun, RealStep]:
    """Both sides; refuses where the plain one is not the same network."""
    model = case.network
    if not isinstance(model, MMDiT) or model.fused_qkv or not (model.use_liger_rope and model.cond_embed):
        raise SystemExit("--compare is written for the network of 2.0's recipes (split layout, half-split positions)")
    if torch.cuda.is_available() or section.precision != "fp32":
        raise SystemExit("--compare runs in fp32 on a CPU, where both sides can be held to equal losses")
    ours = RealStep(case, section)
    return PlainRun(case, ours, section.grad_clip), ours


def _met(name: str, found: float, wanted: float, form: str) -> str:
    return f"{name}: {found:{form}}, target {wanted:{form}}: {'met' if found >= wanted else 'missed'}"


def _setting(text: str) -> tuple[str, Any]:
    """`key=value` of the engine's section; a value is JSON, or a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--levers", action="store_true", help="one row a lever")
    mode.add_argument("--compare", action="store_true", help="beside plain torch, on a CPU")
    mode.add_argument("--gpu-table", action="store_true", help="both cases of 2.0 with all levers, on one GPU")
    parser.add_argument("--recipe", default="v2_0")
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--blocks", type=_pair, help="blocks of each kind, as 4,8; of a paper profile few by default")
    parser.add_argument("--heads", type=int, help="heads of the recipe's size: the width")
    parser.add_argument("--resolution", default="256px")
    parser.add_argument("--frames", type=int, help="frames of a clip in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each side of --compare")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows that start later are left out")
    parser.add_argument(
        "--set", action="append", default=[], help="a key of the engine's section, as recompute=selective"
    )
    return parser.parse_args(argv)


def _pair(text: str) -> tuple[int, int]:
    first, second = text.split(",")
    return int(first), int(second)


if __name__ == "__main__":
    main()
