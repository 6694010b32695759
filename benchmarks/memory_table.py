"""Memory of every published stage: what one GPU holds, how few would do, and which batch would fit.

`python -m benchmarks.memory_table [--out benchmarks/memory.md]` needs no GPU and no torch: it is `ml/memory.py`'s
estimate of the recipes' `paper` profiles, printed as Markdown or written to a file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from ml.counts import parameters
from ml.memory import GIB, cells, largest_batch, memory, min_devices, usable, worst
from ml.recipe import Recipe, available
from ml.sections import Stage

SIZES = (80.0, 141.0)
COMMAND = "python -m benchmarks.memory_table --out benchmarks/memory.md"
HEAD = f"""# Memory of the published stages

`{COMMAND}`

An estimate, by `ml/memory.py`, of one rank of every stage of the `paper` profiles, in GiB. States are weights,
gradients, masters, moments and the moving average at the stage's engine and number of GPUs; the peak is the dearest
bucket at its published batch, with buffers and 2 GiB for CUDA and NCCL (assumed). *Fewest* is the least number of GPUs
on which every bucket fits at its published batch, of 80 GB and of 141 GB; *none* says that no number of GPUs makes it
fit, as what does not fit is not sharded. Activations are counted on the networks themselves (tests), states follow from
the engines; nothing here was measured on a GPU. Where clips are encoded while training or samples are shown, the
weights of autoencoder and text encoder are in the peak, what they compute is not.
"""
BATCHES = """## Largest batch of every bucket

Examples a GPU (a group of GPUs that share a sequence, where there are any), as published and as would fit at the
stage's number of GPUs; neighbouring lengths of a resolution that have the same published batch stand in one row, which
holds for the longest of them.
"""


def main() -> None:
    """Print the tables, or write them to `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="file to write instead of printing")
    out = parser.parse_args().out
    if out is None:
        print(document())
    else:
        out.write_text(document(), encoding="utf-8")


def document() -> str:
    """The whole file."""
    recipes = [Recipe.load(name, "paper") for name in available()]
    lines = [HEAD, *_table(STAGES, [row for recipe in recipes for row in stage_rows(recipe)]), "", BATCHES]
    for recipe in recipes:
        lines += [f"### {recipe.title}", ""]
        lines += [*_table(BUCKETS, [row for stage in recipe.stages for row in batch_rows(recipe, stage)]), ""]
    return "\n".join(lines).rstrip() + "\n"


STAGES = (
    *("recipe", "stage", "parameters", "GPUs", "sharding", "blocks recomputed", "states", "dearest bucket", "batch"),
    *("peak", "fewest of 80 GB", "fewest of 141 GB"),
)
BUCKETS = ("stage", "resolution", "frames", "GiB an example", "published", "fits in 80 GB", "fits in 141 GB")


def stage_rows(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """One row a stage."""
    for stage in recipe.stages:
        (resolution, frames), found = worst(recipe, stage)
        engine = stage.engine
        parallel = f", sequence {engine.sequence_parallel}" if engine.sequence_parallel > 1 else ""
        fewest = (min_devices(recipe, stage, usable(size)) for size in SIZES)
        yield (
            *(recipe.name, stage.name, f"{parameters(recipe.network) / 1e9:.2f} B"),
            *(f"{stage.compute.devices} {stage.compute.accelerators.split(':')[0]}", f"{engine.sharding}{parallel}"),
            _recomputed(recipe, stage),
            *(_gib(found.states.total), f"{resolution}, {frames} f", str(found.batch), _gib(found.total)),
            *("none" if count is None else str(count) for count in fewest),
        )


def batch_rows(recipe: Recipe, stage: Stage) -> Iterator[tuple[str, ...]]:
    """One row a run of lengths of a resolution with one published batch."""
    runs: list[list[tuple[str, int]]] = []
    for cell in cells(stage):
        same = runs and runs[-1][0][0] == cell[0] and _batch(stage, runs[-1][0]) == _batch(stage, cell)
        joined = same and (runs[-1][0][1] == 1) == (cell[1] == 1)
        runs[-1].append(cell) if joined else runs.append([cell])
    for run in runs:
        longest = max(run, key=lambda cell: cell[1])
        frames = str(run[0][1]) if len(run) == 1 else f"{run[0][1]} to {run[-1][1]}"
        example = memory(recipe, stage, longest).activations.peak
        most = (str(largest_batch(recipe, stage, longest, usable(size))) for size in SIZES)
        yield stage.name, longest[0], frames, f"{example / GIB:.2f}", str(_batch(stage, longest)), *most


def _batch(stage: Stage, cell: tuple[str, int]) -> int:
    return stage.buckets[cell[0]][cell[1]].batch


def _recomputed(recipe: Recipe, stage: Stage) -> str:
    model, chosen = recipe.network, stage.engine.checkpoint_blocks
    if model.kind != "mmdit":
        return f"{min(chosen[0], model.depth)} of {model.depth}"
    kinds = zip(chosen, (model.depth, model.depth_single_blocks), strict=True)
    return " and ".join(f"{min(count, depth)} of {depth}" for count, depth in kinds)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; columns of numbers stand to the right."""
    left = {"recipe", "stage", "sharding", "resolution", "dearest bucket", "frames", "blocks recomputed"}
    rule = ["---" if head in left else "---:" for head in heads]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


if __name__ == "__main__":
    main()
