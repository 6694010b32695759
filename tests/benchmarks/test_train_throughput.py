"""Rows, tables and targets of the training benchmark, and both sides of its comparison."""

import pytest
import torch

from benchmarks import train_throughput
from benchmarks.real_step import Case, Measured
from benchmarks.train_throughput import LEVERS, ON_CPU, case_of, main, verdict
from ml.recipe import Recipe

TINY = ["--profile", "tiny", "--resolution", "64px", "--blocks", "1,1", "--heads", "2", "--frames", "5", "--steps", "1"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


@needs_no_gpu
def test_one_row_says_what_it_is_of_and_claims_nothing_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--set", "recompute=selective", "--set", "checkpoint_blocks=[9,9]"])
    printed = " ".join(capsys.readouterr().out.split())
    for said in (
        "v2_0-tiny: 1 + 1 blocks of width 48, 2 heads",
        "64px x 5 frames (32 + 48 tokens)",
        "as asked",
        "1.00x",
    ):
        assert said in printed
    assert "there is none here, so nothing is said of them" in printed


@needs_no_gpu
def test_every_lever_has_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes and is tested where it is made; without it here."""
    monkeypatch.setattr(train_throughput, "LEVERS", [lever for lever in LEVERS if not lever.over.get("compile")])
    main([*TINY, "--levers"])
    printed = capsys.readouterr().out
    for lever in (*LEVERS[:4], *ON_CPU):
        assert printed.count(lever.name) >= 2, "as it is made, and in the table"


def test_levers_that_start_too_late_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--levers", "--minutes", "0"])
    assert capsys.readouterr().out.count("no time left") == len(LEVERS) + len(ON_CPU)


@needs_no_gpu
def test_both_steps_have_equal_losses_and_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--compare", "--repeats", "2"])
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("plain torch", "the house", "1.00x", "losses agree within 1e-4 at every step"):
        assert said in printed


@needs_no_gpu
def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["--gpu-table"])
    with pytest.raises(SystemExit, match=r"written for the network of 2\.0"):
        main(["--compare", "--recipe", "v1_2", "--profile", "tiny", "--resolution", "144p", "--frames", "17"])
    with pytest.raises(SystemExit, match="runs in fp32"):
        main([*TINY, "--compare", "--set", "precision=bf16"])


def test_targets_stand_beside_what_was_measured_on_their_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_throughput, "accelerator", lambda: "H100")
    monkeypatch.setattr(Measured, "utilisation", property(lambda found: found.tflops / 989))
    case = Case(Recipe.load("v2_0", "paper"), "256px", 129, blocks=(2, 4))
    slow = Measured(seconds=0.2, tokens=8448, tflop=0.2 * 989 * 0.4, peak_bytes=1, waited=0.0, losses=())
    quick = Measured(seconds=0.1, tokens=8448, tflop=0.1 * 989 * 0.5, peak_bytes=1, waited=0.0, losses=())
    assert "MFU: 40.0%, target 45.0%: missed" in verdict(case, slow)
    assert "whole network: 4,4" in verdict(case, slow)
    assert verdict(case, quick).count("met") == 2
    assert "tokens" not in verdict(Case(case.recipe, "768px", 33, blocks=(2, 4)), quick)


def test_a_machine_gets_a_case_of_its_size() -> None:
    asked = train_throughput._arguments([])
    case = case_of(asked)
    if torch.cuda.is_available():
        assert (case.network.hidden_size, case.frames) == (3072, 129)
    else:
        assert (case.network.hidden_size, case.frames, case.blocks) == (256, 5, (1, 2))
