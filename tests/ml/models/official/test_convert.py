"""Every name is accounted for: what is used, what is refused and why, and tensors only read group by group."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ml import architectures
from ml.models.mmdit import MMDiT
from ml.models.official.convert import apply, check, groups
from ml.models.official.files import Official
from ml.models.official.report import Entry
from ml.models.official.rules import Step
from ml.models.stdit3 import STDiT3

CONFIG = architectures.STDiT3(depth=1, hidden_size=16, num_heads=2, caption_channels=8, model_max_length=4)
Make = Callable[..., Any]


@pytest.fixture
def state() -> dict[str, Tensor]:
    return STDiT3(CONFIG).state_dict()


def refused(official: Make, target: Make, state: dict[str, Tensor]) -> list[Entry]:
    found: list[Entry] = check(official(state), target(STDiT3(CONFIG), CONFIG)).report.having("refused")
    return found


def test_a_misspelt_name_is_refused_with_the_nearest(official: Make, target: Make, state: dict[str, Tensor]) -> None:
    state["t_block.1.wait"] = state.pop("t_block.1.weight")
    unknown, missing = refused(official, target, state)
    assert unknown.name == "t_block.1.wait"
    assert unknown.how == "unknown name; the nearest of mine is t_block.1.weight"
    assert missing.name == "t_block.1.weight"
    assert missing.how.startswith("missing")


def test_a_wrong_shape_is_refused_with_both(official: Make, target: Make, state: dict[str, Tensor]) -> None:
    state["t_block.1.weight"] = state["t_block.1.weight"][:, :8]
    (entry,) = refused(official, target, state)
    assert (entry.name, entry.how) == ("t_block.1.weight", "shape [96, 8], mine has [96, 16]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(
    official: Make, target: Make, state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    state["t_block.1.weight"] = state["t_block.1.weight"].to(dtype)
    (entry,) = refused(official, target, state)
    assert "quantised" in entry.how


def test_another_network_is_refused_quickly(official: Make, target: Make, state: dict[str, Tensor]) -> None:
    """Nearest names of thousands of unknown ones would take minutes, and say nothing."""
    strange = {f"layer.{i}.weight": torch.zeros(1) for i in range(3000)}
    entries = refused(official, target, strange)
    assert len(entries) == 3000 + len(state) - len({"rope.freqs"})
    assert "nearest" not in entries[0].how


def test_weights_that_cannot_be_split_are_refused_not_raised(official: Make, target: Make) -> None:
    small: dict[str, Any] = {"vec_in_dim": 4, "context_in_dim": 4, "num_heads": 2, "depth": 1, "depth_single_blocks": 1}
    flux = architectures.MMDiT(**small, hidden_size=16, axes_dim=(4, 2, 2), fused_qkv=True, use_liger_rope=False)
    config = architectures.MMDiT(**small, hidden_size=32, axes_dim=(4, 6, 6), cond_embed=True, fused_qkv=False)
    report = check(official(MMDiT(flux).state_dict()), target(MMDiT(config), config)).report
    block = [entry for entry in report.having("refused") if entry.name == "double_blocks.0.img_attn.qkv.weight"]
    assert "do not fit a width of 32" in block[0].how
    assert "of another size" in report.hint


def test_blocks_are_read_one_after_the_other(official: Make, target: Make) -> None:
    small: dict[str, Any] = {"vec_in_dim": 4, "context_in_dim": 4, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}
    flux = architectures.MMDiT(**small, hidden_size=16, axes_dim=(4, 2, 2), fused_qkv=True, use_liger_rope=False)
    split = {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
    config = architectures.MMDiT(**small, hidden_size=16, axes_dim=(4, 2, 2), **split)
    opened: Official = official(MMDiT(flux).state_dict())
    read: list[str] = []
    watched = Official(opened.path, (), opened.headers, (), lambda name: (read.append(name), opened.read(name))[1])
    checked = check(watched, target(MMDiT(config), config))
    assert read == []
    made = iter(checked.tensors())
    while not next(made)[0].startswith("double_blocks.0."):
        pass
    assert not any(name.startswith(("double_blocks.1", "single_blocks")) for name in read)
    assert len(list(made)) > 0
    assert sorted(read) == sorted(opened.headers)


def test_only_blocks_are_converted_together() -> None:
    names = [
        "img_in.weight",
        "double_blocks.0.a",
        "double_blocks.10.a",
        "double_blocks.0.b",
        "blocks.0.a",
        "blocks.0.b",
    ]
    assert groups(names) == [
        ["img_in.weight"],
        ["double_blocks.0.a", "double_blocks.0.b"],
        ["double_blocks.10.a"],
        ["blocks.0.a"],
        ["blocks.0.b"],
    ]


def test_every_tensor_remembers_where_it_came_from() -> None:
    def split(state: dict[str, Tensor]) -> dict[str, Tensor]:
        halves = state["m.ab.weight"].chunk(2)
        return {"m.a.weight": halves[0], "m.b.weight": halves[1], "same": state["same"], "other": state["other"] * 2}

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("m.a.", "m.alpha."): tensor for name, tensor in state.items()}

    state = {"m.ab.weight": torch.arange(4.0), "same": torch.ones(1), "other": torch.ones(1)}
    made, trace = apply(state, [Step("split", split), Step("renamed", rename)])
    assert torch.equal(made["m.alpha.weight"], torch.tensor([0.0, 1.0]))
    assert trace == {
        "m.alpha.weight": ("split, then renamed", ("m.ab.weight",)),
        "m.b.weight": ("split", ("m.ab.weight",)),
        "same": ("", ("same",)),
        "other": ("split", ("other",)),
    }
