"""Timing turn about, and tables that say where they were measured."""

import sys
import time

import pytest
import torch
from rich.console import Console

from benchmarks.common import Pair, arguments, table, time_both, times


def test_a_ratio_is_the_median_of_each_repeats_own() -> None:
    """A repeat on a busy machine, twice as slow on both sides, moves the seconds but not the ratio."""
    pair = Pair(first=(4.0, 8.0, 4.4), second=(2.0, 4.0, 2.0))
    assert pair.seconds == (4.4, 2.0)
    assert pair.ratio == 2.0


def test_both_sides_are_warmed_up_and_timed_turn_about() -> None:
    calls: list[str] = []
    pair = time_both(lambda: calls.append("first"), lambda: calls.append("second"), 3)
    assert calls == ["first", "second"] * 4
    assert len(pair.first) == len(pair.second) == 3
    assert min(pair.first + pair.second) > 0


def test_a_slower_side_is_found_slower() -> None:
    pair = time_both(lambda: time.sleep(0.02), lambda: time.sleep(0.005), 3)
    assert pair.seconds[0] >= 0.02
    assert pair.ratio > 1.5


def test_tables_name_the_machine_torch_and_threads() -> None:
    console = Console(width=150, record=True)
    console.print(table("Title", ["size", "ratio"], [["16x256", times(1.234)]], "seed 0"))
    printed = console.export_text()
    for said in ("Title", "16x256", "1.23x", torch.__version__, "threads", "seed 0"):
        assert said in printed


def test_the_command_line_asks_for_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--repeats", "2"])
    asked = arguments("What it does.\n\nMore.")
    assert (asked.tiny, asked.repeats) == (True, 2)
