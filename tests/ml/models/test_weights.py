"""Weights and their card: what is written comes back, what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch

from ml.models.weights import (
    CARD,
    WEIGHTS,
    Card,
    CheckpointMismatch,
    Origin,
    check_card,
    load_state,
    read_card,
    save_weights,
)

LATENT = {"scale": 0.5, "mean": [], "std": []}
TINY = Card("mmdit", {"width": 96, "axes": (4, 10, 10)}, Origin("v2_0-tiny", "stage1"), LATENT)


def test_weights_are_float32_and_the_card_comes_back(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    save_weights(tmp_path, {"a": tied.bfloat16(), "b": tied[::2], "c": tied[::2]}, TINY)
    state = load_state(tmp_path)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(state["a"], tied)
    assert torch.equal(state["b"], state["c"])
    card = read_card(tmp_path)
    assert (card.kind, card.origin, card.latent) == (TINY.kind, TINY.origin, LATENT)
    check_card(tmp_path, card, TINY)
    assert not list(tmp_path.glob("*.partial"))


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="no finished weights"):
        read_card(tmp_path)
    (tmp_path / CARD).write_text(json.dumps({}))
    with pytest.raises(CheckpointMismatch, match="no finished weights"):
        read_card(tmp_path)


def test_everything_that_differs_is_named_on_both_sides(tmp_path: Path) -> None:
    other = Card("hunyuan", {"width": 128, "extra": 1}, Origin("v1_2-tiny", "stage1"))
    with pytest.raises(CheckpointMismatch) as caught:
        check_card(tmp_path, TINY, other)
    message = str(caught.value)
    for part in (
        "kind is 'mmdit', wanted 'hunyuan'",
        "recipe is 'v2_0-tiny', wanted 'v1_2-tiny'",
        "config width is 96, wanted 128",
        "config extra is None, wanted 1",
    ):
        assert part in message


def test_stage_and_latents_may_differ(tmp_path: Path) -> None:
    check_card(tmp_path, TINY, Card(TINY.kind, TINY.config, Origin("v2_0-tiny", "stage3"), latent=None))


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, left: int) -> None:
    save_weights(tmp_path, {"a": torch.arange(64.0)}, TINY)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:left])
    with pytest.raises(CheckpointMismatch, match=r"weights\.safetensors is cut short or damaged"):
        load_state(tmp_path)
