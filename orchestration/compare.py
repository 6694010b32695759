"""Recipes side by side: what each generation is, what it costs, and what was measured of it in this workspace."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from infra.settings import Settings
from ml.architectures import AutoencoderNet
from ml.counts import forward_flops
from ml.plan import Plan, parameters, plan
from ml.processes import IDDPM
from ml.recipe import Recipe, user_folders
from ml.shapes import Size
from orchestration.resources import walk_of
from orchestration.show import facts_of, figure

ABSENT = "-"
# Metrics of a report that are shown; those of VBench are shown wherever any of the reports has them.
MEASURED = {
    "loss/held_out": "held-out loss",
    "loss/untrained": "the same, untrained",
    "reconstruction/psnr": "reconstruction, dB",
    "reconstruction/ssim": "reconstruction, SSIM",
    "reconstruction/lpips": "reconstruction, LPIPS",
    "vbench/total": "VBench total",
}
NOT_COMPARABLE = (
    "Held-out losses of different objectives do not compare, nor do metrics under different protocols (sizes, prompts, "
    "seeds); each stands beside its own untrained loss."
)


@dataclass
class Column:
    """One recipe: rows by name, in the order they are printed, and why rows are absent."""

    recipe: Recipe
    rows: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def missing(self, names: Sequence[str], reason: str) -> None:
        """Mark rows as absent."""
        self.rows |= dict.fromkeys(names, ABSENT)
        self.reasons.append(reason)


def compare(names: Sequence[str], profile: str = "paper") -> Table:
    """A table with one column a recipe; works without a workspace, whose reports then are absent.

    Raises RecipeError for an unknown recipe or profile, and ValueError for fewer than two names.
    """
    if len(set(names)) < 2:
        raise ValueError(f"name two recipes at least to compare them, got {', '.join(names) or 'none'}")
    columns = [column(Recipe.load(name, profile, user_folders())) for name in dict.fromkeys(names)]
    rows = list(dict.fromkeys(name for each in columns for name in each.rows))
    table = Table(
        title=f"{len(columns)} recipes, profile {profile}",
        caption="\n".join([*_reasons(columns), NOT_COMPARABLE]),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for each in columns:
        table.add_column(each.recipe.name, justify="right")
    for name in rows:
        table.add_row(name, *(each.rows.get(name, ABSENT) for each in columns))
    return table


def column(recipe: Recipe) -> Column:
    """Everything that is known of a recipe: what it is, what a sample costs, what training costs, what was measured."""
    found = Column(recipe)
    found.rows |= {"generation": recipe.generation}
    _network(found)
    _sample(found)
    _training(found, plan(recipe))
    _measured(found)
    return found


def _network(found: Column) -> None:
    recipe, autoencoder = found.recipe, found.recipe.autoencoder
    stride = recipe.strides
    found.rows |= {
        "network": recipe.network.kind,
        "parameters": quantity(parameters(recipe)),
        "autoencoder": autoencoder.kind,
        "its parameters": quantity(autoencoder_parameters(autoencoder.net)),
        "compression t x h x w": f"{stride.temporal}x{stride.spatial}x{stride.spatial}",
        "latent channels": str(autoencoder.latent_channels),
    }


def _sample(found: Column) -> None:
    """The clip that the recipe's `sampling` asks for; text counts with all of its tokens, padding too."""
    recipe, sampling = found.recipe, found.recipe.sampling
    size = sampled_size(recipe)
    grid = recipe.strides.grid(size, sampling.frames)
    rows = num_evaluations(recipe, grid[0])
    once = forward_flops(recipe.network, grid, recipe.text.max_tokens)
    process = recipe.objective
    found.rows |= {
        "sample": f"{sampling.frames} f {size}",
        "latent grid t x h x w": "x".join(map(str, grid)),
        "visual tokens": f"{recipe.strides.tokens(size, sampling.frames):,}",
        "text tokens": str(recipe.text.max_tokens),
        "objective": process.kind if isinstance(process, IDDPM) else f"{process.kind} {process.law}",
        "solver": sampling.solver,
        "steps": str(sampling.steps),
        "network evaluations": str(rows),
        "FLOPs an evaluation": quantity(once),
        "FLOPs a sample": quantity(once * rows),
    }


def _training(found: Column, planned: Plan) -> None:
    found.rows |= {
        "stages": str(len(planned.stages)),
        "plan, device-days": figure(planned.gpu_hours / 24),
        "plan, US$": figure(planned.usd),
    }
    days, usd = planned.published_gpu_days, planned.published_usd
    if days is None or usd is None:
        found.missing(["published, GPU-days", "published, US$"], "no GPU-days were published for every stage")
    else:
        found.rows |= {"published, GPU-days": figure(days), "published, US$": figure(usd)}


def _measured(found: Column) -> None:
    report = report_of(found.recipe)
    if report is None:
        found.missing(list(MEASURED.values()), "no report in this workspace")
        return
    metrics, absent = report["metrics"], report["absent"]
    for key, label in MEASURED.items():
        if key in metrics:
            found.rows[label] = f"{metrics[key]:.4f}"
        else:
            found.missing([label], f"{label}: {absent.get(key, 'the report does not hold it')}")
    dimensions = {k: v for k, v in metrics.items() if k.startswith("vbench/") and k not in MEASURED}
    found.rows |= {f"VBench {name.removeprefix('vbench/')}": f"{value:.4f}" for name, value in dimensions.items()}


def _reasons(columns: Sequence[Column]) -> list[str]:
    """Why figures are absent, each reason once with its recipes."""
    of: dict[str, list[str]] = {}
    for each in columns:
        for reason in each.reasons:
            of.setdefault(reason, []).append(each.recipe.id)
    return [f"{', '.join(recipes)}: {reason}" for reason, recipes in of.items()]


def report_of(recipe: Recipe) -> dict[str, Any] | None:
    """The last report of a recipe in this installation's workspace, or None."""
    made = facts_of(walk_of([recipe], Settings()), (recipe.name, "report"))
    if made is None:
        return None
    report: dict[str, Any] = json.loads((made.folder / "report.json").read_text(encoding="utf-8"))
    return report


def autoencoder_parameters(net: AutoencoderNet) -> int:
    """Learned parameters of an autoencoder, counted on the meta device."""
    import torch

    from ml.models.autoencoders.registry import build_autoencoder

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_autoencoder(net).parameters())


def sampled_size(recipe: Recipe) -> Size:
    """Height and width of the recipe's sample, as sampling chooses them."""
    from ml.sampling.generator import sample_size

    return sample_size(recipe)


def num_evaluations(recipe: Recipe, latent_frames: int) -> int:
    """Rows that the network evaluates for one sample, none of them twice."""
    from ml.diffusion import guidance

    sampling = recipe.sampling
    scales = guidance.Guidance.of(recipe.objective, sampling)
    return guidance.num_evaluations(guidance.plan(scales, sampling.steps, sampling.condition, latent_frames))


def quantity(value: float) -> str:
    """Three digits and a prefix: 11.9 G, 5.09 P."""
    power = max(0, min(5, int(math.log10(value) // 3))) if value >= 1 else 0
    scaled = value / 1000**power
    digits = max(0, 2 - int(math.log10(scaled))) if scaled >= 1 else 2
    return f"{scaled:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P'][power]}".strip()
