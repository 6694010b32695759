"""Both attentions do the work that is claimed of them, and stand in one table."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.factorised_attention import SIZES, FullBlock, Similar, flop_ratio, full_flops, main, measure
from ml.models.sequence import HERE
from ml.models.stdit_layers import Moment, PackedText


def test_similarity_keeps_the_work_apart_as_far_as_at_full_size() -> None:
    for size in SIZES:
        assert flop_ratio(Similar(size, 8)) == pytest.approx(flop_ratio(Similar(size, 1)), rel=0.05)
    assert [flop_ratio(Similar(size, 1)) for size in SIZES] == pytest.approx([6.37, 2.13, 1.14], rel=0.01)


def test_tokens_of_a_frame_shrink_and_frames_do_not() -> None:
    assert Similar(SIZES[0], 1).grid == (64, 64, 64)
    assert [t * h * w // 4 for t, h, w in (Similar(size, 8).grid for size in SIZES)] == [8192, 2048, 512]


def test_the_full_block_does_the_work_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on the meta device, of whose autocast torch knows nothing."""
    monkeypatch.setattr("ml.models.attention._computed_in", lambda x: x.dtype)
    case = Similar(SIZES[2], 16)
    frames, height, width = case.grid
    size = case.config.hidden_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, text = torch.zeros(1, frames, height * width // 4, size), PackedText(torch.zeros(7, size), [7])
        out = FullBlock(case.config)(x, Moment(torch.zeros(1, 6 * size)), text, HERE, torch.zeros(1, frames, size))
    assert out.shape == x.shape
    assert counter.get_total_flops() * case.config.depth == full_flops(case.config, case.grid, 7)


def test_both_sides_are_timed_in_one_run() -> None:
    pair = measure(Similar(SIZES[2], 16), train=True, repeats=2)
    assert len(pair.first) == len(pair.second) == 2


def test_the_table_holds_both_sides_and_what_was_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny", "--repeats", "1"])
    main()
    printed = capsys.readouterr().out
    for said in ("s, full", "s, STDiT", "forward", "training", "1.71x", "0.97x", "16x512x512", "seed 0"):
        assert said in printed
