"""What a finished training leaves behind beside its weights: the loss picture and the numbers of `result.json`."""

import resource
from typing import Any

import torch

from ml.section import Section
from ml.training.curves import edge_losses, plot_losses, read_log
from ml.training.trainer import Trainer


def params(section: Section, prefix: str = "") -> dict[str, object]:
    """A recipe section as flat parameters (`optimizer.lr`), which is what two runs are compared by."""
    flat: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        flat |= params(value, f"{prefix}{name}.") if isinstance(value, Section) else {f"{prefix}{name}": value}
    return flat


def numbers(trainer: Trainer) -> dict[str, float]:
    """The metrics of a finished training; rates are over the seconds spent in steps, whatever attempts they took."""
    rows = read_log(trainer.plan.out / "loss.csv")
    first, last = edge_losses(rows)
    seconds, examples, tokens = (float(rows[name].sum()) for name in ("seconds", "examples", "tokens"))
    return {
        "loss_first": first,
        "loss_last": last,
        "steps": float(len(rows)),
        "examples": examples,
        "tokens": tokens,
        "examples_per_second": examples / seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait_share": float((rows["data_wait_share"] * rows["seconds"]).sum()) / seconds,
        "num_parameters": float(sum(tensor.numel() for tensor in trainer.engine.masters().values())),
        "peak_memory_mb": peak_memory_mb(trainer.engine.device),
    }


def facts(trainer: Trainer) -> dict[str, Any]:
    """What an epoch was: batches, examples, the smaller last batches, and how many different examples were seen."""
    sampler = trainer.stream.sampler
    return {
        "epoch_batches": sampler.epoch_length(),
        "epoch_examples": sampler.num_examples(),
        "tail_batches": {str(cell): size for cell, size in sampler.tails().items()},
        "examples_seen": len(trainer.stream.consumed),
    }


def draw(trainer: Trainer) -> str:
    """Draw `loss.png` beside the weights and return its name."""
    plan = trainer.plan
    plot_losses(read_log(plan.out / "loss.csv"), f"{plan.identity.recipe} {plan.identity.stage}", plan.out / "loss.png")
    return "loss.png"


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far: the GPU's where there is one, else the process's, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # ru_maxrss is in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
