"""Reports: identity, honesty about changes, comparison, intervals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluation.report import Report, ReportError, compare, interval

VIDEOS = {"0-0.mp4": 0.9, "0-1.mp4": 0.92, "1-0.mp4": 0.8, "1-1.mp4": 0.82}


def test_json_brings_the_same_report_back_and_notices_a_changed_number(report):
    assert Report.from_json(report.as_json()) == report
    data = json.loads(report.as_json())
    data["metrics"]["loss/held_out"] = 0.5
    with pytest.raises(ReportError, match="was changed after it was written"):
        Report.from_json(json.dumps(data))
    for broken in ("{}", "[1]", "nonsense", json.dumps({**data, "extra": 1})):
        with pytest.raises(ReportError, match="not a report"):
            Report.from_json(broken)


def test_the_id_follows_everything(report, protocol):
    others = [
        replace(report, checkpoint="d" * 16),
        replace(report, metrics={"loss/held_out": 1.1}),
        replace(report, protocol=replace(protocol, seeds=(0, 2))),
    ]
    assert len({r.id for r in (report, *others)}) == 4
    assert report.id == replace(report).id


def test_equal_protocols_compare_metric_by_metric(report):
    after = replace(report, checkpoint="d" * 16, metrics={"loss/held_out": 0.7, "new": 1.0})
    (change,) = compare(report, after)
    assert (change.metric, change.difference) == ("loss/held_out", pytest.approx(-0.1))


def test_unequal_protocols_are_refused_naming_every_field(report, protocol):
    other = replace(report, protocol=replace(protocol, seeds=(0, 2), vbench_version="0.1.6"))
    with pytest.raises(ReportError, match=r"seeds \(\(0, 1\) against \(0, 2\)\); vbench_version"):
        compare(report, other)


def test_intervals_draw_whole_prompts(report):
    # Two prompts of mean 0.91 and 0.81: a draw of two holds 0, 1 or 2 times the first, so the ends are the means.
    assert interval(VIDEOS) == pytest.approx((0.81, 0.91))
    assert report.intervals() == {"vbench/temporal_flickering": pytest.approx((0.81, 0.91))}
    assert interval({"0-0.mp4": 1.0, "0-1.mp4": 0.0}) is None


def test_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(1).normal(0.0, 1.0, 400)
    low, high = interval({f"{i}-0.mp4": float(v) for i, v in enumerate(values)})
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(400), rel=0.1)
