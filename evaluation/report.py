"""The report of one checkpoint: every metric under one protocol, and the rule that unequal protocols never compare.

Most quarrels about scores come from two numbers measured under different settings (VBench issues 122, 134, 202). A
report therefore carries everything that can move a number but is not the checkpoint, and its id is a digest of it all.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class ReportError(ValueError):
    """A report that cannot be read, or two that do not compare, naming the field that differs."""


@dataclass(frozen=True)
class Protocol:
    """What was asked and with which tools: everything but the checkpoint that can change a metric.

    Digests are 16 hex digits; those of `sampling` and `objective` are of the recipe's whole sections, and the
    fields from `resolution` to `oscillate` show what a reader asks for first. `device` is a class of machine (`cpu`, or
    the accelerator's name), not one machine.
    """

    recipe: str
    prompt_set: str
    prompt_digest: str
    seeds: tuple[int, ...]
    resolution: str
    aspect: str
    frames: int
    fps: float
    sampling_steps: int
    guidance_text: float
    guidance_image: float
    oscillate: bool
    sampling_digest: str
    objective_digest: str
    loss_timesteps: int
    loss_clips: int
    held_out_digest: str
    autoencoder_digest: str
    text_encoder_digest: str
    lpips_digest: str
    vbench_version: str
    torch_version: str
    device: str


@dataclass(frozen=True)
class Report:
    """All metrics of one checkpoint. `absent` maps a metric that could not be measured to the reason.

    `per_video` holds, for metrics that have them, the value of each sample by file name `<prompt index>-<seed>.mp4`.
    """

    checkpoint: str
    protocol: Protocol
    metrics: Mapping[str, float]
    absent: Mapping[str, str]
    per_video: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """16 hex digits over everything the report says: same id, same report."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of every metric that has per-video values of at least two prompts."""
        found = {name: interval(values) for name, values in self.per_video.items()}
        return {name: ends for name, ends in found.items() if ends is not None}

    def as_json(self) -> str:
        """The report as JSON text, with its id."""
        return json.dumps({"id": self.id, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report of a JSON text; raises ReportError when fields are missing or the id does not fit the content."""
        try:
            data: dict[str, Any] = json.loads(text)
            said = data.pop("id")
            protocol = Protocol(**{**data["protocol"], "seeds": tuple(data["protocol"]["seeds"])})
            report = cls(**{**data, "protocol": protocol, "notes": tuple(data["notes"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ReportError(f"not a report: {error}") from error
        if report.id != said:
            raise ReportError(f"report {said} was changed after it was written: its content has id {report.id}")
        return report


@dataclass(frozen=True)
class Change:
    """One metric in two reports, and the difference `after - before`."""

    metric: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        """How much it grew."""
        return self.after - self.before


def compare(before: Report, after: Report) -> list[Change]:
    """Metrics that both reports have; raises ReportError naming every protocol field in which they differ."""
    different = [
        f"{f.name} ({getattr(before.protocol, f.name)} against {getattr(after.protocol, f.name)})"
        for f in fields(Protocol)
        if getattr(before.protocol, f.name) != getattr(after.protocol, f.name)
    ]
    if different:
        raise ReportError(f"reports {before.id} and {after.id} do not compare: {'; '.join(different)}")
    shared = [name for name in before.metrics if name in after.metrics]
    return [Change(name, before.metrics[name], after.metrics[name]) for name in shared]


def interval(values: Mapping[str, float], seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean over videos, resampling whole prompts; None for fewer than two.

    Samples of one prompt resemble each other, so the prompt (the file name up to its last dash) is what is drawn.
    """
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        groups.setdefault(name.rpartition("-")[0], []).append(value)
    if len(groups) < 2:
        return None
    sums = np.array([sum(group) for group in groups.values()])
    counts = np.array([len(group) for group in groups.values()])
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
