"""The nouns of run tracking: what a run is called, tagged and closed with; no vendor is needed to say them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Tag(StrEnum):
    """Tags of a run; the ledger and the launchers read them.

    `parent` is the run that an attempt belongs to; `parent_of` is on that run, with the key of the step.
    """

    RECIPE = "recipe"
    PROFILE = "profile"
    STEP = "step"
    STEP_KEY = "step_key"
    ATTEMPT = "attempt"
    PURPOSE = "purpose"
    INTENDED_PURPOSE = "intended_purpose"
    ACCELERATORS = "accelerators"
    DEVICES = "devices"
    NODES = "nodes"
    PRICE_ROW = "price_row"
    USD_PER_HOUR = "usd_per_hour"
    GIT_COMMIT = "git.commit"
    HANDLE = "handle"
    OUT = "out"
    DAGSTER_RUN = "dagster.run_id"
    DAGSTER_ASSET = "dagster.asset_key"
    HEARTBEAT = "heartbeat"
    PARENT = "parent"
    PARENT_OF = "parent_of"


class Bill(StrEnum):
    """Metrics that close a run: dollars, accelerator hours (0 on CPUs), seconds."""

    COST_USD = "cost_usd"
    GPU_HOURS = "gpu_hours"
    WALL_SECONDS = "wall_seconds"


class Total(StrEnum):
    """Metrics that close the parent of several attempts: never those of a bill, which would be paid twice."""

    ATTEMPTS = "total_attempts"
    COST_USD = "total_cost_usd"
    WALL_SECONDS = "total_wall_seconds"
    GOODPUT = "total_goodput"


# Metric of a training, its last value: seconds that went into steps that were kept.
SECONDS_USEFUL = "seconds_useful"


class Status(StrEnum):
    """How a run stands, in MLflow's words."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class RunRecord:
    """One run as MLflow holds it; times are in UTC, `ended` is None while it is open, metrics are the last values."""

    run_id: str
    experiment: str
    name: str
    status: str
    started: datetime
    ended: datetime | None
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    params: Mapping[str, str]
