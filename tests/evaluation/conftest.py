"""What several tests of the evaluation floor share: a report."""

import pytest

from evaluation.report import Protocol, Report


@pytest.fixture
def report(protocol: Protocol) -> Report:
    """A report with one loss, a baseline, one dimension with two prompts, and one that is absent."""
    videos = {"0-0.mp4": 0.9, "0-1.mp4": 0.92, "1-0.mp4": 0.8, "1-1.mp4": 0.82}
    metrics = {"loss/held_out": 0.8, "loss/untrained": 1.0, "vbench/temporal_flickering": 0.86}
    absent = {"vbench/scene": "no <weights>"}
    return Report("c" * 16, protocol, metrics, absent, {"vbench/temporal_flickering": videos}, ("a note",))
