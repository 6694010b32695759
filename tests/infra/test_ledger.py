"""The bill: published figures come out to the cent, and nothing that was spent is missing."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from infra.ledger import Ledger, LedgerError, Purpose, bill, by, cost, frame_of, headline, reprice, summary, total
from infra.prices import price
from infra.runs import Bill, RunRecord, Status, Tag
from infra.tracking import Tracker

DAY = 24 * 3600
START = datetime(2025, 1, 1, tzinfo=UTC)
NOW = datetime(2025, 12, 31, tzinfo=UTC)
# Open-Sora 2.0's three stages: GPUs and GPU-days (arXiv 2503.09642; peers.md, 6.5).
STAGES = {"dit_stage1": (224, 2240), "dit_stage2": (192, 384), "dit_stage3": (192, 1536)}


def record(
    step: str = "dit_stage1",
    seconds: float = 3600,
    devices: int = 8,
    purpose: str = Purpose.HEADLINE,
    status: str = Status.FINISHED,
    **tags: str,
) -> RunRecord:
    """A run that was billed by the 2025 price of the paper, `seconds` long."""
    row = price("h200-hist-2025q1")
    closed = status != Status.RUNNING
    written = {
        Tag.RECIPE: "v2_0",
        Tag.STEP: step,
        Tag.ATTEMPT: "1",
        Tag.PURPOSE: purpose,
        Tag.ACCELERATORS: "H200:8",
        Tag.DEVICES: str(devices),
        Tag.PRICE_ROW: row.id,
        Tag.USD_PER_HOUR: str(row.usd_per_hour),
    }
    return RunRecord(
        run_id=f"{step}-{purpose}-{seconds}-{status}",
        experiment="v2_0-paper",
        name=step,
        status=status,
        started=START,
        ended=START + timedelta(seconds=seconds) if closed else None,
        metrics=bill(seconds, devices, row) if closed else {},
        tags={str(key): value for key, value in {**written, **tags}.items()},
        params={},
    )


@pytest.fixture
def published() -> list[RunRecord]:
    return [record(step, days * DAY / gpus, gpus) for step, (gpus, days) in STAGES.items()]


def test_the_published_run_costs_what_the_paper_says(published: list[RunRecord]) -> None:
    frame = frame_of(published, NOW)
    assert total(frame) == 199_680.00
    assert by(frame, "step").set_index("step")["cost_usd"].round(2).to_dict() == {
        "dit_stage1": 107_520.00,
        "dit_stage2": 18_432.00,
        "dit_stage3": 73_728.00,
    }
    assert by(frame, "step")["device_hours"].sum() == pytest.approx(99_840)


def test_a_failed_share_of_twelve_percent_is_shown_beside_the_headline(published: list[RunRecord]) -> None:
    failed = [
        record(step, 0.12 * days * DAY / gpus, gpus, Purpose.FAILED, Status.FAILED)
        for step, (gpus, days) in STAGES.items()
    ]
    frame = frame_of([*published, *failed], NOW)
    figures = summary(frame)
    assert figures["headline_usd"] == 199_680.00
    assert figures["other_usd"] == 23_961.60
    assert figures["all_in_usd"] == 223_641.60
    assert figures["ratio"] == pytest.approx(1.12)
    for column in ("step", "purpose", "status", "attempt"):
        assert round(by(frame, column)["cost_usd"].sum(), 2) == figures["all_in_usd"], column


def test_every_purpose_is_in_the_all_in_sum_and_only_one_in_the_headline() -> None:
    frame = frame_of([record(seconds=3600 * (i + 1), purpose=p) for i, p in enumerate(Purpose)], NOW)
    assert set(headline(frame)["purpose"]) == {Purpose.HEADLINE}
    assert total(frame) == 8 * 2.00 * sum(range(1, len(Purpose) + 1))


def test_a_run_that_did_not_finish_is_no_headline() -> None:
    frame = frame_of([record(status=status) for status in Status], NOW)
    assert list(headline(frame)["status"]) == [Status.FINISHED]


def test_an_open_run_counts_up_to_now_and_is_flagged() -> None:
    frame = frame_of([record(status=Status.RUNNING)], START + timedelta(hours=3))
    assert frame["is_open"].tolist() == [True]
    assert frame["seconds"].tolist() == [3 * 3600]
    assert total(frame) == 3 * 8 * 2.00
    assert total(headline(frame)) == 0


def test_a_run_that_lost_its_metrics_is_billed_by_its_interval() -> None:
    lost = record(seconds=1800)
    frame = frame_of([replace(lost, metrics={})], NOW)
    assert total(frame) == total(frame_of([lost], NOW)) == 8.00


def test_the_same_hours_at_another_price_keep_the_original_figure(published: list[RunRecord]) -> None:
    frame = frame_of(published, NOW)
    again = reprice(frame, price("h200-od-2026"))
    assert total(again) == 398_361.60
    assert round(again["billed_usd"].sum(), 2) == 199_680.00
    assert total(reprice(frame, price("h200-coreweave-od-2026"))) == 629_491.20
    assert total(frame) == 199_680.00


def test_the_price_a_run_was_started_with_outlives_the_book() -> None:
    frame = frame_of([record(price_row="a-row-of-last-year")], NOW)
    assert total(frame) == 16.00


def test_a_run_without_a_price_row_is_not_on_the_bill() -> None:
    by_hand = record()
    tags = {key: value for key, value in by_hand.tags.items() if key != Tag.PRICE_ROW}
    frame = frame_of([replace(by_hand, tags=tags)], NOW)
    assert len(frame) == 0
    assert summary(frame) == {"headline_usd": 0, "other_usd": 0, "all_in_usd": 0, "ratio": 0}
    assert len(by(frame, "purpose")) == 0


@pytest.mark.parametrize(("tag", "value"), [("purpose", "fun"), ("purpose", ""), ("devices", "eight")])
def test_a_run_that_cannot_be_billed_names_the_tag(tag: str, value: str) -> None:
    good = record()
    with pytest.raises(LedgerError, match=tag):
        frame_of([replace(good, tags={**good.tags, tag: value})], NOW)


def test_cost_of_cores_counts_no_gpu_hours() -> None:
    row = price("cpu-assume-2026")
    assert cost(3600, 2, row) == pytest.approx(0.10)
    assert bill(3600, 2, row) == {Bill.COST_USD: pytest.approx(0.10), Bill.GPU_HOURS: 0, Bill.WALL_SECONDS: 3600}
    assert bill(3600, 8, price("h200-od-2026"))[Bill.GPU_HOURS] == 8
    with pytest.raises(LedgerError, match="0 or more"):
        cost(-1, 2, row)


def test_the_ledger_reads_real_runs(tracker: Tracker) -> None:
    row = price("h200-od-2026")
    for purpose, status in ((Purpose.HEADLINE, Status.FINISHED), (Purpose.PREEMPTED, Status.KILLED)):
        billed = record(purpose=purpose, price_row=row.id, usd_per_hour=str(row.usd_per_hour))
        run_id = tracker.open("v2_0-tiny", "dit_stage1", billed.tags)
        tracker.close(run_id, status, bill(900, 8, row))
    tracker.open("v2_0-tiny", "dit_stage2", record(step="dit_stage2").tags)
    tracker.open("other", "by hand")
    frame = Ledger(tracker).rows()
    assert sorted(frame["status"]) == [Status.FINISHED, Status.KILLED, Status.RUNNING]
    closed = frame[~frame["is_open"]]
    assert total(closed) == round(2 * 0.25 * 8 * 3.99, 2)
    assert total(headline(frame)) == round(0.25 * 8 * 3.99, 2)
    assert isinstance(frame["started"].dtype, pd.DatetimeTZDtype)
    assert len(Ledger(tracker).rows("v2_0-tiny", "tags.step = 'dit_stage2'")) == 1
