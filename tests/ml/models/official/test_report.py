"""What is said about weights: counts, folded rows, and which recipe they are for."""

from collections.abc import Callable
from typing import Any

import pytest

from ml import architectures
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.mmdit import MMDiT
from ml.models.official.convert import check
from ml.models.official.report import Entry, Report
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3

SMALL: dict[str, Any] = {"depth": 1, "hidden_size": 24, "num_heads": 2, "caption_channels": 8}
WINDOWS: dict[str, Any] = {"in_channels": 16, "kernel_size": (8, 8, -1), "use_spatial_rope": True}
FLUX: dict[str, Any] = {"vec_in_dim": 4, "context_in_dim": 4, "depth": 1, "depth_single_blocks": 1}
FLUX |= {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
CONFIGS: dict[str, Any] = {
    "v1_0": architectures.STDiT(**SMALL),
    "v1_1": architectures.STDiT2(**SMALL),
    "v1_2": architectures.STDiT3(**SMALL),
    "v1_3": architectures.STDiT3(**SMALL, **WINDOWS),
    "v2_0": architectures.MMDiT(**FLUX, hidden_size=16, num_heads=1, axes_dim=(4, 6, 6)),
}
CLASSES = {"stdit": STDiT, "stdit2": STDiT2, "stdit3": STDiT3, "mmdit": MMDiT}
Make = Callable[..., Any]


def report_of(official: Make, target: Make, have: Any, want: Any) -> Report:
    source, network = (CLASSES[config.kind](config) for config in (have, want))
    report: Report = check(official(source.state_dict()), target(network, want, "wanted")).report
    return report


@pytest.mark.parametrize(
    ("have", "want"), [(have, want) for have in CONFIGS for want in CONFIGS if have != want], ids="-".join
)
def test_every_generation_is_sent_to_its_own_recipe(official: Make, target: Make, have: str, want: str) -> None:
    report = report_of(official, target, CONFIGS[have], CONFIGS[want])
    assert not report.fits
    assert f"Import them with --recipe {have}" in report.hint
    assert ("--source opensora_4ch" in report.hint) == ((have, want) == ("v1_2", "v1_3"))


def test_both_generations_are_named(official: Make, target: Make) -> None:
    hint = report_of(official, target, CONFIGS["v1_2"], CONFIGS["v1_3"]).hint
    assert hint.startswith("these look like 1.2's STDiT-3; wanted wants 1.3's windowed STDiT-3")


def test_another_size_is_said_to_be_another_profile(official: Make, target: Make) -> None:
    larger = architectures.STDiT3(**{**SMALL, "depth": 2})
    hint = report_of(official, target, larger, CONFIGS["v1_2"]).hint
    assert "of another size (2 deep, 24 wide; wanted has 1 deep, 24 wide)" in hint
    assert "profile" in hint


def test_an_autoencoder_is_sent_to_its_part(official: Make, target: Make) -> None:
    net = architectures.HunyuanNet(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    config = CONFIGS["v2_0"]
    state = build_autoencoder(net).net.state_dict()
    hint = check(official(state), target(MMDiT(config), config)).report.hint
    assert hint.endswith("pass --part autoencoder")


def test_a_stranger_is_called_one(official: Make, target: Make) -> None:
    import torch

    config = CONFIGS["v1_2"]
    hint = check(official({"fc.weight": torch.zeros(1)}), target(STDiT3(config), config)).report.hint
    assert hint == "nothing in these names is familiar; mine wants 1.2's STDiT-3"


def test_a_changed_file_of_the_right_generation_is_called_that(official: Make, target: Make) -> None:
    config = CONFIGS["v1_2"]
    state = STDiT3(config).state_dict()
    del state["t_block.1.bias"]
    hint = check(official(state), target(STDiT3(config), config)).report.hint
    assert "names or shapes differ: a damaged or changed file" in hint


def test_rows_of_many_blocks_are_folded_and_refusals_come_first() -> None:
    entries = [Entry(f"blocks.{i}.a", "converted", f"split, from blocks.{i}.b", (f"blocks.{i}.b",)) for i in range(9)]
    report = Report((Entry("x", "used"), *entries, Entry("y", "refused", "why")), "PixArt-alpha", "pixart_alpha")
    assert report.groups() == [
        ("refused", "y", "why", 1),
        ("converted", "blocks.*.a", "split, from blocks.*.b", 9),
    ]
    assert report.counts() == {"used": 1, "converted": 9, "refused": 1}
    assert report.summary() == "1 used, 9 converted, 1 refused (looks like PixArt-alpha, read as pixart_alpha)"
    assert [row["name"] for row in report.to_dict()["names"]] == [*(e.name for e in entries), "y"]


def test_what_was_unwrapped_is_in_the_summary() -> None:
    assert Report((), "", "opensora", ("key `ema`",)).summary().endswith("unwrapped: key `ema`")
