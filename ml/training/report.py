"""What a finished training leaves behind beside its weights: the loss picture and the numbers of `result.json`."""

from typing import Any

from ml.section import Section
from ml.training import consumed
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
    """The metrics of a finished training; rates are over the seconds spent in steps, whatever attempts they took.

    Goodput and where the other seconds went are of the last attempt.
    """
    rows = read_log(trainer.plan.out / "loss.csv")
    first, last = edge_losses(rows)
    seconds, examples, tokens = (float(rows[name].sum()) for name in ("seconds", "examples", "tokens"))
    return {
        **trainer.aids.meter.totals(),
        "loss_first": first,
        "loss_last": last,
        "steps": float(len(rows)),
        "examples": examples,
        "tokens": tokens,
        "examples_per_second": examples / seconds,
        "tokens_per_second": tokens / seconds,
        "data_wait_share": float((rows["data_wait_share"] * rows["seconds"]).sum()) / seconds,
        "mfu": float((rows["mfu"] * rows["seconds"]).sum()) / seconds,
    }


def facts(trainer: Trainer) -> dict[str, Any]:
    """What an epoch was: batches, examples, the smaller last batches, and how many different examples were seen."""
    sampler, rows = trainer.stream.sampler, consumed.read(trainer.ledger.folder)
    return {
        "epoch_batches": sampler.epoch_length(),
        "epoch_examples": sampler.num_examples(),
        "tail_batches": {str(cell): size for cell, size in sampler.tails().items()},
        **consumed.facts(rows, trainer.plan.steps, sampler.epoch_length()),
        "ranks": trainer.engine.size,
    }


def draw(trainer: Trainer) -> str:
    """Draw `loss.png` beside the weights and return its name."""
    plan = trainer.plan
    plot_losses(read_log(plan.out / "loss.csv"), f"{plan.identity.recipe} {plan.identity.stage}", plan.out / "loss.png")
    return "loss.png"
