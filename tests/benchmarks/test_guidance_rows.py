"""Fewer rows, the same samples."""

import sys

import pytest

from benchmarks.guidance_rows import main, measure


@pytest.mark.parametrize(("kind", "rows"), [("t2v", 80), ("i2v_head", 110), ("i2v_loop", 110)])
def test_samples_are_equal_at_fewer_rows(kind: str, rows: int) -> None:
    found = measure(kind, tiny=True, repeats=1)
    assert found.evaluations == (150, rows)
    assert found.difference < 1e-12
    assert found.size > 0.1, "a silent network would make any two samplers agree"


def test_the_table_holds_both_sides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--repeats", "1"])
    main()
    printed = capsys.readouterr().out
    for said in ("rows, original", "rows, ours", "150", "80", "110", "1.88x", "1.36x", "seed 0"):
        assert said in printed
