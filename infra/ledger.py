"""The ledger: what was spent, as a view over runs; it stores nothing, so costs cannot drift from runs.

Every attempt is one row, failed ones included. The headline is what published figures mean by cost: the successful
runs that trained the model. All-in is every row. The gap between the two is the part of the bill that papers omit.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

import pandas as pd

from infra.prices import PriceRow, price
from infra.runs import Bill, RunRecord, Status, Tag
from infra.tracking import Tracker

Number = TypeVar("Number", int, float)

SECONDS_PER_HOUR = 3600
COLUMNS = {
    "run_id": "str",
    "recipe": "str",
    "step": "str",
    "attempt": "int64",
    "purpose": "str",
    "intended_purpose": "str",
    "started": "datetime64[ms, UTC]",
    "ended": "datetime64[ms, UTC]",
    "seconds": "float64",
    "accelerators": "str",
    "devices": "int64",
    "price_row": "str",
    "usd_per_hour": "float64",
    "cost_usd": "float64",
    "status": "str",
    "is_open": "bool",
}


class LedgerError(ValueError):
    """A run that cannot be billed, naming the run and the tag."""


class Purpose(StrEnum):
    """What a run was for; `failed`, `preempted` and `idle` replace the intended purpose when a run ends so."""

    HEADLINE = "headline"
    FAILED = "failed"
    PREEMPTED = "preempted"
    IDLE = "idle"
    ABLATION = "ablation"
    DATA = "data"
    CAPTION = "caption"
    EVAL = "eval"
    LABEL = "label"
    STORAGE = "storage"


def cost(seconds: float, devices: int, price_row: PriceRow) -> float:
    """Dollars for that many accelerators during that time; raises LedgerError for a negative time or number."""
    if seconds < 0 or devices < 0:
        raise LedgerError(f"{seconds} seconds on {devices} devices cannot be billed; both must be 0 or more")
    return seconds / SECONDS_PER_HOUR * devices * price_row.usd_per_hour


def bill(seconds: float, devices: int, price_row: PriceRow) -> dict[str, float]:
    """The metrics that close a run: dollars, accelerator hours (0 for cores, which are no accelerators), seconds."""
    hours = 0.0 if price_row.gpu == "CPU" else seconds / SECONDS_PER_HOUR * devices
    return {
        Bill.COST_USD: cost(seconds, devices, price_row),
        Bill.GPU_HOURS: hours,
        Bill.WALL_SECONDS: seconds,
    }


class Ledger:
    """The runs of one tracker as a table of costs."""

    def __init__(self, tracker: Tracker) -> None:
        """Keep the tracker; every call reads it anew."""
        self.tracker = tracker

    def rows(self, experiment: str | None = None, filter: str = "", now: datetime | None = None) -> pd.DataFrame:
        """One row a run that carries a price, oldest first; runs still open are counted up to `now` and flagged.

        Raises LedgerError for a run whose tags cannot be read as a bill.
        """
        return frame_of(self.tracker.runs(experiment, filter), now or datetime.now(UTC))


def frame_of(records: Iterable[RunRecord], now: datetime) -> pd.DataFrame:
    """The ledger's table of these runs; a run without a price row (opened by hand, say) spends nothing we know of."""
    rows = [_row(record, now) for record in records if Tag.PRICE_ROW in record.tags]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return frame.sort_values(["started", "run_id"], ignore_index=True)


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that published figures count: successful runs whose purpose was the model itself."""
    return frame[(frame["purpose"] == Purpose.HEADLINE) & (frame["status"] == Status.FINISHED)]


def total(frame: pd.DataFrame) -> float:
    """All-in dollars of these rows, to the cent."""
    return round(float(frame["cost_usd"].sum()), 2)


def summary(frame: pd.DataFrame) -> dict[str, float]:
    """Headline, the rest, all-in (dollars to the cent) and all-in over headline (0 when there is no headline yet)."""
    head, everything = total(headline(frame)), total(frame)
    return {
        "headline_usd": head,
        "other_usd": round(everything - head, 2),
        "all_in_usd": everything,
        "ratio": everything / head if head else 0.0,
    }


def by(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Runs, seconds, device-hours and dollars by `step`, `purpose` or any other column, dearest first."""
    hours = frame["seconds"] / SECONDS_PER_HOUR * frame["devices"]
    grouped = frame.assign(device_hours=hours).groupby(column)
    table = grouped.agg(
        num_runs=("run_id", "size"),
        seconds=("seconds", "sum"),
        device_hours=("device_hours", "sum"),
        cost_usd=("cost_usd", "sum"),
    )
    return table.sort_values("cost_usd", ascending=False).reset_index()


def reprice(frame: pd.DataFrame, price_row: PriceRow) -> pd.DataFrame:
    """The same hours at another price; `billed_usd` keeps the original figure."""
    hours = frame["seconds"] / SECONDS_PER_HOUR * frame["devices"]
    return frame.assign(
        billed_usd=frame["cost_usd"],
        price_row=price_row.id,
        usd_per_hour=price_row.usd_per_hour,
        cost_usd=hours * price_row.usd_per_hour,
    )


def _row(record: RunRecord, now: datetime) -> dict[str, object]:
    """A closed run is billed by its metrics, an open one (or one that lost them) by its interval and price."""
    tags = record.tags
    elapsed = max(0.0, ((record.ended or now) - record.started).total_seconds())
    seconds = record.metrics.get(Bill.WALL_SECONDS, elapsed)
    devices = _number(record, Tag.DEVICES, int)
    usd_per_hour = _usd_per_hour(record)
    reckoned = seconds / SECONDS_PER_HOUR * devices * usd_per_hour
    purpose = _text(tags, Tag.PURPOSE)
    if purpose not in set(Purpose):
        raise LedgerError(f"run {record.run_id}: purpose {purpose!r} is none of {', '.join(Purpose)}; correct its tag")
    return {
        "run_id": record.run_id,
        "recipe": _text(tags, Tag.RECIPE),
        "step": _text(tags, Tag.STEP),
        "attempt": _number(record, Tag.ATTEMPT, int) if Tag.ATTEMPT in tags else 1,
        "purpose": purpose,
        "intended_purpose": _text(tags, Tag.INTENDED_PURPOSE) or purpose,
        "started": record.started,
        "ended": record.ended,
        "seconds": seconds,
        "accelerators": _text(tags, Tag.ACCELERATORS),
        "devices": devices,
        "price_row": tags[Tag.PRICE_ROW],
        "usd_per_hour": usd_per_hour,
        "cost_usd": record.metrics.get(Bill.COST_USD, reckoned),
        "status": record.status,
        "is_open": record.ended is None,
    }


def _usd_per_hour(record: RunRecord) -> float:
    """The price that the run was started with; the book is asked only for runs that did not write it down."""
    if Tag.USD_PER_HOUR in record.tags:
        return _number(record, Tag.USD_PER_HOUR, float)
    return price(record.tags[Tag.PRICE_ROW]).usd_per_hour


def _text(tags: Mapping[str, str], tag: Tag) -> str:
    return tags.get(tag, "")


def _number(record: RunRecord, tag: Tag, kind: type[Number]) -> Number:
    try:
        return kind(record.tags[tag])
    except (KeyError, ValueError) as error:
        raise LedgerError(f"run {record.run_id}: tag {tag} is not a number: {error}; correct it in MLflow") from error
