"""The two latents are those of a 768px clip, and stand in one table."""

import sys

import pytest

from benchmarks.high_compression import SIDES, flop_ratio, main, measure, num_tokens


def test_tokens_are_those_of_the_clip_and_of_its_likeness() -> None:
    assert [num_tokens(side, 1) - 512 for side in SIDES] == [76_032, 18_432]
    for shrink in (16, 32):
        found = [num_tokens(side.smaller(shrink, 1), shrink) * shrink for side in SIDES]
        assert found == [num_tokens(side, 1) for side in SIDES]


def test_flops_fall_tenfold_at_full_size_and_by_similarity() -> None:
    assert flop_ratio(SIDES, 1, (19, 38)) == pytest.approx(10.27, abs=0.01)
    small = (SIDES[0].smaller(16, 1), SIDES[1].smaller(16, 1))
    assert flop_ratio(small, 16) == pytest.approx(10.27, rel=0.02)


def test_both_sides_are_timed_in_one_run() -> None:
    pair = measure((SIDES[0].smaller(32, 8), SIDES[1].smaller(32, 8)), 32, train=True, repeats=2)
    assert len(pair.first) == len(pair.second) == 2
    assert pair.seconds[0] > pair.seconds[1]


def test_the_table_holds_both_sides_and_what_was_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--repeats", "1"])
    main()
    printed = capsys.readouterr().out
    for said in ("s, 4x8x8", "s, DC-AE", "forward", "training", "10.27x", "5.2x", "seed 0"):
        assert said in printed
