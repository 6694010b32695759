"""Conditions: which latents are given, what the network sees of them, and how short clips fall back."""

from collections import Counter

import pytest
import torch

from ml.diffusion import conditions
from ml.diffusion.conditions import Given, Kind


@pytest.mark.parametrize(
    ("kind", "frames", "given"),
    [
        ("t2v", 5, []),
        ("i2v_head", 5, [0]),
        ("i2v_tail", 5, [4]),
        ("i2v_loop", 5, [0, 4]),
        ("v2v_head", 33, list(range(9))),
        ("v2v_tail", 33, list(range(24, 33))),
        ("v2v_head_easy", 33, list(range(17))),
        ("v2v_tail_easy", 33, list(range(16, 33))),
    ],
)
def test_masks(kind: Kind, frames: int, given: list[int]) -> None:
    assert conditions.mask(kind, frames).nonzero().flatten().tolist() == given


@pytest.mark.parametrize(
    ("kind", "frames", "becomes"),
    [
        ("v2v_head_easy", 18, "v2v_head_easy"),
        ("v2v_head_easy", 17, "v2v_head"),
        ("v2v_tail_easy", 9, "i2v_tail"),
        ("v2v_head", 10, "v2v_head"),
        ("v2v_head", 9, "i2v_head"),
        ("v2v_tail", 5, "i2v_tail"),
        ("v2v_head", 1, "t2v"),
        ("i2v_loop", 3, "i2v_loop"),
        ("i2v_loop", 2, "i2v_head"),
        ("i2v_tail", 2, "i2v_tail"),
        ("i2v_head", 1, "t2v"),
        ("t2v", 1, "t2v"),
    ],
)
def test_short_clips_fall_back_until_something_is_left_to_make(kind: Kind, frames: int, becomes: Kind) -> None:
    assert conditions.fitting(kind, frames) == becomes
    assert conditions.mask(kind, frames).sum() < frames


def test_a_condition_is_the_mask_and_the_masked_latent() -> None:
    latent = torch.randn(3, 16, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    built = conditions.condition(latent, ["t2v", "i2v_head", "i2v_loop"])
    assert built.shape == (3, 17, 5, 2, 4)
    assert (built[0] == 0).all()
    assert (built[1, 0, 0] == 1).all()
    assert torch.equal(built[1, 1:, 0], latent[1, :, 0])
    assert (built[1, :, 1:] == 0).all()
    assert torch.equal(built[2, 1:, [0, 4]], latent[2, :, [0, 4]])
    assert (built[2, :, 1:4] == 0).all()


def test_a_tail_is_the_picture_encoded_alone() -> None:
    latent, tails = torch.randn(4, 16, 5, 2, 2), torch.randn(4, 16, 1, 2, 2)
    before = latent.clone()
    built = conditions.condition(latent, ["i2v_tail", "i2v_head", "i2v_loop", "t2v"], tails=tails)
    assert torch.equal(built[[0, 2], 1:, 4], tails[[0, 2], :, 0])
    assert torch.equal(built[1, 1:, 0], latent[1, :, 0])
    assert torch.equal(latent, before)


def test_heads_encoded_alone_stand_first() -> None:
    latent, heads = torch.randn(3, 16, 12, 2, 2), torch.randn(3, 16, 1, 2, 2)
    built = conditions.condition(latent, ["i2v_head", "v2v_head", "i2v_tail"], heads=heads)
    assert torch.equal(built[0, 1:, 0], heads[0, :, 0])
    assert torch.equal(built[1, 1:, :9], latent[1, :, :9])
    assert (built[2, :, 0] == 0).all()


@pytest.mark.parametrize(("kind", "given"), [("v2v_head", 8), ("v2v_tail_easy", 16), ("i2v_head", 1)])
def test_an_autoencoder_that_is_not_causal_gives_a_latent_less_of_a_stretch(kind: Kind, given: int) -> None:
    assert conditions.mask(kind, 32, causal=False).sum() == given
    assert sum(conditions.ends(kind, 32, causal=False)) == given


def test_placed_references_equal_the_training_condition() -> None:
    latent, tails = torch.randn(1, 16, 5, 2, 2), torch.randn(1, 16, 1, 2, 2)
    placed = conditions.place([latent[0, :, :1], tails[0]], "i2v_loop", (5, 2, 2))
    assert torch.equal(placed, conditions.condition(latent, ["i2v_loop"], tails=tails))
    video = torch.randn(16, 12, 2, 2)
    tail = conditions.place([video], "v2v_tail", (33, 2, 2))
    assert torch.equal(tail[0, 1:, -9:], video[:, -9:])


def test_references_that_do_not_fit_are_refused() -> None:
    picture = torch.randn(16, 1, 2, 2)
    with pytest.raises(ValueError, match="takes 2 references, got 1"):
        conditions.place([picture], "i2v_loop", (5, 2, 2))
    with pytest.raises(ValueError, match="needs 9 latents"):
        conditions.place([picture], "v2v_head", (33, 2, 2))
    with pytest.raises(ValueError, match="takes no condition"):
        conditions.place([], "t2v", (5, 2, 2))
    with pytest.raises(ValueError, match="leaves nothing to make of 5"):
        conditions.place([picture.expand(-1, 5, -1, -1)], "v2v_head", (5, 2, 2), (5, 0))
    with pytest.raises(ValueError, match=r"v2v_head with 9 \+ 0 given latents leaves nothing to make of 5"):
        conditions.place([picture.expand(-1, 9, -1, -1)], "v2v_head", (5, 2, 2))
    with pytest.raises(ValueError, match="gives no fixed number"):
        conditions.ends("other", 5)


def test_1_3_gives_as_many_latents_as_it_likes() -> None:
    film = torch.randn(16, 12, 2, 2)
    placed = conditions.place([film], "v2v_head", (15, 2, 2), (5, 0))
    assert placed[0, 0, :, 0, 0].tolist() == [1] * 5 + [0] * 10
    assert torch.equal(placed[0, 1:, :5], film[:, :5])


def test_given_latents_and_conditions_say_the_same() -> None:
    latent = torch.randn(2, 16, 5, 2, 2)
    condition = conditions.condition(latent, ["i2v_loop", "i2v_loop"])
    given = Given.of(condition, "i2v_loop")
    assert given.indices == (0, 4)
    assert given.mask.tolist() == [[0, 1, 1, 1, 0]] * 2
    assert torch.equal(given.condition, condition)
    assert Given(latent[:1], given.mask[:1], "i2v_loop").expand(3).condition.shape == (3, 17, 5, 2, 2)
    with pytest.raises(ValueError, match="keeps or makes whole frames"):
        _ = Given(latent, torch.full((2, 5), 0.4), "i2v_head").condition
    with pytest.raises(ValueError, match="same frames of every sample"):
        _ = Given(latent, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]), "i2v_head").indices


def test_given_latents_are_restored_untouched() -> None:
    latent, made = torch.randn(1, 16, 5, 2, 2), torch.randn(1, 16, 5, 2, 2)
    restored = conditions.restore(made, conditions.condition(latent, ["i2v_loop"]))
    assert torch.equal(restored[:, :, [0, 4]], latent[:, :, [0, 4]])
    assert torch.equal(restored[:, :, 1:4], made[:, :, 1:4])


def test_kinds_are_drawn_by_weight_and_seed() -> None:
    weights: dict[Kind, float] = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    drawn = conditions.draw(weights, 8000, torch.Generator().manual_seed(0))
    counts = Counter(drawn)
    assert counts["i2v_head"] / 8000 == pytest.approx(5 / 8, abs=0.02)
    assert counts["t2v"] / 8000 == pytest.approx(1 / 8, abs=0.02)
    assert drawn == conditions.draw(weights, 8000, torch.Generator().manual_seed(0))
    assert conditions.draw({"t2v": 1}, 3, torch.Generator()) == ["t2v"] * 3
