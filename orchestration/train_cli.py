"""`opensora train`: one stage alone, after a look at what it will take; what cannot fit is refused before it starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich import box
from rich.table import Table

from assets.checkpoints import checkpoint_key
from assets.tasks import Runner
from ml import memory as m
from ml.plan import StagePlan
from ml.plan import plan as plan_of
from ml.recipe import Recipe, RecipeError, user_folders
from ml.sections import AutoencoderStage, Stage
from orchestration import show
from orchestration.problems import problems, stop
from orchestration.session import Session


@dataclass(frozen=True)
class TrainOptions:
    """What `train` can be told; every field is an option of the command line."""

    recipe: Annotated[str, typer.Option(help="Recipe that the stage is of.")]
    stage: Annotated[str, typer.Option(help="Stage to train: of the transformer, or a phase of the autoencoder.")]
    profile: Annotated[str, typer.Option(help="Profile of the recipe: `tiny`, `paper`, ...")] = "tiny"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and memory, start nothing; 2 = no fit.")] = False
    batch_sizes: Annotated[bool, typer.Option("--batch-sizes", help="Show the largest batch of every bucket.")] = False
    force: Annotated[bool, typer.Option("--force", help="Start although the estimate says that it cannot fit.")] = False


@dataclass(frozen=True)
class Look:
    """A stage with the estimate of its dearest bucket and the memory of one rank."""

    recipe: Recipe
    stage: Stage | AutoencoderStage
    cell: tuple[str, int]
    memory: m.Memory
    space: float

    @classmethod
    def at(cls, recipe: Recipe, stage: Stage | AutoencoderStage) -> "Look":
        """Raises MemoryModelError for an unknown accelerator, or parallel sizes that do not divide the ranks."""
        return cls(recipe, stage, *m.worst(recipe, stage), m.available(stage.compute))

    @property
    def fits(self) -> bool:
        """Whether the dearest bucket fits."""
        return self.memory.total <= self.space

    @property
    def where(self) -> str:
        """One rank's device, in words."""
        compute = self.stage.compute
        if compute.on_cpu:
            return "this machine" if compute.ranks == compute.nodes else f"each of {compute.processes} processes"
        return f"one {compute.accelerators.split(':')[0]}"


def train(options: TrainOptions) -> None:
    """Train one stage alone, once plan and memory were shown; its inputs must be there. Exit code 2: it cannot fit."""
    with problems():
        recipe = Recipe.load(options.recipe, options.profile, user_folders())
        stage = stage_of(recipe, options.stage)
        look = Look.at(recipe, stage)
        if isinstance(stage, Stage):
            planned = next(part for part in plan_of(recipe).stages if part.name == stage.name)
            show.console.print(plan_table(planned, stage, recipe))
        show.console.print(memory_table(look))
        if options.batch_sizes:
            show.console.print(batch_table(look))
        if not look.fits and not options.force:
            stop(refusal(look), 2)
        if options.dry_run:
            show.console.print(f"[green]ok[/green] {recipe.id}/{stage.name}: nothing was started (--dry-run)")
            return
        session = Session.open(options.recipe, options.profile, show.Progress())
        run(session.runner, recipe, stage)


def run(runner: Runner, recipe: Recipe, stage: Stage | AutoencoderStage) -> None:
    """Run the step of a stage and say what came out; raises StepError naming the inputs that are missing."""
    key = (recipe.name, stage.name) if isinstance(stage, AutoencoderStage) else checkpoint_key(recipe, stage)
    done = runner.run(runner.walk.step(key))
    show.console.print(str(done.made.folder), highlight=False, soft_wrap=True)


def stage_of(recipe: Recipe, name: str) -> Stage | AutoencoderStage:
    """The stage of this name, the transformer's or the autoencoder's; raises RecipeError with all that there are."""
    for phase in recipe.phases:
        if phase.name == name:
            return phase
    known = ", ".join(phase.name for phase in recipe.phases) or "none"
    raise RecipeError(f"{recipe.id} trains no stage {name!r}; its stages: {known}")


def refusal(look: Look) -> str:
    """Why a stage is not started, and what would help: everything suggested was tried with the same estimate."""
    need, there = (f"{size / m.GIB:,.1f} GiB" for size in (look.memory.total, look.space))
    resolution, frames = look.cell
    lines = [f"{look.stage.name} cannot fit: {resolution}, {frames} f takes {need} a rank, {look.where} has {there}."]
    fewest = m.min_devices(look.recipe, look.stage, look.space)
    if fewest is not None and fewest > look.stage.compute.ranks:
        lines.append(f"  more devices: {fewest} of them would do, as they share its states")
    lines += [f"  {words}" for words in m.suggestions(look.recipe, look.stage, look.space)]
    if len(lines) == 1:
        lines.append("  no single change of its engine or batches makes it fit: take devices with more memory")
    return "\n".join([*lines, "--batch-sizes shows what fits; --force starts it all the same."])


# --- tables -------------------------------------------------------------------------------------------------------


def plan_table(planned: StagePlan, stage: Stage, recipe: Recipe) -> Table:
    """Steps, buckets, hours and dollars of the stage."""
    table = _table(f"{recipe.title}, profile {recipe.profile}: {stage.name}", "stage", stage.name, justify="left")
    buckets = len(m.cells(stage))
    devices = f"{planned.devices} {'cores' if stage.compute.on_cpu else planned.accelerator}"
    shared = f", {stage.engine.sharding}" if stage.engine.sharding != "none" else ""
    hours, ranks = planned.gpu_hours / planned.devices, stage.compute.ranks
    rows = (
        ("steps", f"{stage.steps:,}, a checkpoint every {stage.checkpoint_every:,}"),
        ("buckets", f"{buckets} of {', '.join(stage.buckets)}; {show.figure(planned.tokens)} tokens an example"),
        ("devices", f"{devices}, {ranks} rank{'s' * (ranks > 1)} ({stage.engine.kind}{shared})"),
        ("hours", f"{show.figure(hours)}, or {show.figure(planned.gpu_hours)} device-hours"),
        ("dollars", f"${show.figure(planned.usd)} at ${planned.usd_per_device_hour:.2f} a device-hour"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def memory_table(look: Look) -> Table:
    """States, activations of the dearest bucket and the rest, beside what there is."""
    (resolution, frames), found = look.cell, look.memory
    table = _table(f"Memory of {look.where}", "at the widest moment of a step", "GiB")
    for name, size in _parts(found):
        table.add_row(name, _gib(size))
    example = found.activations
    table.add_row(f"activations of {found.batch} x ({resolution}, {frames} f)", _gib(found.batch * example.peak))
    if found.encoders:
        table.add_row("autoencoder and text encoder (weights; their work is not counted)", _gib(found.encoders))
    if found.buffers:
        table.add_row("buffers for gathering and reducing", _gib(found.buffers))
    table.add_row("interpreter" if look.stage.compute.on_cpu else "CUDA and NCCL (assumed)", _gib(found.overhead))
    table.add_section()
    colour = "green" if look.fits else "red"
    table.add_row("total", f"[{colour}]{_gib(found.total)}[/]")
    table.add_row("available", _gib(look.space))
    if example.host:
        table.add_row("on the host, parked", _gib(found.batch * example.host))
    return table


def batch_table(look: Look) -> Table:
    """The largest batch of every bucket beside the recipe's."""
    how, largest = _largest(look)
    table = _table(f"Largest batches, {how}", "bucket", "GiB an example")
    table.add_column("in the recipe", justify="right")
    table.add_column("fits", justify="right")
    for cell in m.cells(look.stage):
        found, most = m.memory(look.recipe, look.stage, cell), largest[cell]
        colour = "green" if most >= found.batch else "red"
        size = f"{found.activations.peak / m.GIB:.3g}"
        table.add_row(f"{cell[0]}, {cell[1]} f", size, f"{found.batch:,}", f"[{colour}]{most:,}[/]")
    return table


def _largest(look: Look) -> tuple[str, dict[tuple[str, int], int]]:
    """How the largest batches were found (by real steps where this is the one GPU asked for), and what they are.

    Real steps are another process's: this one keeps no memory of the GPU from the training that it starts.
    """
    compute = look.stage.compute
    if isinstance(look.stage, Stage) and not compute.on_cpu and compute.ranks == 1:
        from ml.training.batch_search import batch_sizes_apart  # brings torch

        found = batch_sizes_apart(look.recipe, look.stage, look.space)
        return found.how, {(name, frames): n for name, sizes in found.sizes.items() for frames, n in sizes.items()}
    return "predicted", {c: m.largest_batch(look.recipe, look.stage, c, look.space) for c in m.cells(look.stage)}


def _parts(found: m.Memory) -> Iterator[tuple[str, float]]:
    """States that a rank has, by name."""
    states = found.states
    named = {"weights": states.weights, "gradients": states.gradients, "fp32 masters": states.masters}
    named |= {"Adam's moments": states.moments, "moving average": states.average}
    yield from ((name, size) for name, size in named.items() if size)


def _gib(size: float) -> str:
    gib = size / m.GIB
    return f"{gib:,.1f}" if gib >= 1 else f"{gib:.2g}"


def _table(title: str, first: str, second: str, justify: Literal["left", "right"] = "right") -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column(first, no_wrap=True)
    table.add_column(second, justify=justify)
    return table
