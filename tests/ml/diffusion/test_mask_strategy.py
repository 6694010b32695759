"""The language of 1.1 and 1.2: what it says, what it places, and what it refuses."""

import pytest
import torch

from ml.diffusion import mask_strategy
from ml.diffusion.mask_strategy import MaskStrategyError, Placement, Wish


@pytest.mark.parametrize(
    ("text", "placements"),
    [
        ("", ()),
        ("0", (Placement(),)),
        ("0,0,0,-8,8", (Placement(0, 0, 0, -8, 8, 0.0),)),
        ("0;0,1,0,-1,1", (Placement(), Placement(0, 1, 0, -1, 1, 0.0))),
        ("0,0,0,0,32,0.4", (Placement(0, 0, 0, 0, 32, 0.4),)),
        ("1, 2", (Placement(1, 2, 0, 0, 1, 0.0),)),
    ],
)
def test_the_documented_strategies(text: str, placements: tuple[Placement, ...]) -> None:
    assert mask_strategy.parse(text) == placements


@pytest.mark.parametrize("text", ["0,0,0,0,1,0,0", "a", "0,,1", "0,0,0,0,1.5", "-1", "0,0,0,0,0", "0,0,0,0,1,2", "0;"])
def test_unknown_syntax_is_refused(text: str) -> None:
    with pytest.raises(MaskStrategyError, match="mask strategy"):
        mask_strategy.parse(text)


def test_a_tail_of_the_prompt_names_references_and_a_strategy() -> None:
    found = mask_strategy.split_tail('A cat.{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,-1,1"}')
    assert found == Wish("A cat.", ("a.png", "b.mp4"), "0;0,1,0,-1,1")
    assert mask_strategy.split_tail("A cat.") == Wish("A cat.")
    assert mask_strategy.split_tail('A cat.{"mask_strategy": "0"}') == Wish("A cat.", None, "0")
    for wrong in ('A {"strategy": "0"}', "A {cat", 'A {"mask_strategy": 0}'):
        with pytest.raises(MaskStrategyError, match="tail"):
            mask_strategy.split_tail(wrong)


def test_a_prompt_may_change_over_loops() -> None:
    prompt = "|0|a cat |2| a dog"
    assert [mask_strategy.loop_prompt(prompt, loop) for loop in range(4)] == ["a cat", "a cat", "a dog", "a dog"]
    assert mask_strategy.loop_prompt("a | cat", 3) == "a | cat"
    for wrong in ("|0|a|2", "|0|a|x|b", "|0|a|0|b"):
        with pytest.raises(MaskStrategyError, match="loop"):
            mask_strategy.loop_prompt(wrong, 0)


def test_references_stand_where_the_strategy_says() -> None:
    noise, film, picture = torch.randn(4, 10, 2, 2), torch.randn(4, 6, 2, 2), torch.randn(4, 1, 2, 2)
    placements = mask_strategy.parse("0,0,-2,0,4,0.4;0,1,0,-1,1;1,1")
    latent, mask = mask_strategy.apply(noise, [film, picture], placements)
    assert mask.tolist() == pytest.approx([0.4, 0.4, 1, 1, 1, 1, 1, 1, 1, 0])
    assert torch.equal(latent[:, :2], film[:, -2:])
    assert torch.equal(latent[:, 9:], picture)
    assert torch.equal(latent[:, 2:9], noise[:, 2:9])
    later, mask = mask_strategy.apply(noise, [film, picture], placements, loop=1)
    assert mask.tolist() == [0, *[1] * 9]
    assert torch.equal(later[:, :1], picture)


@pytest.mark.parametrize(("start", "found"), [(0, 0), (2, 0), (3, 5), (7, 5), (8, 10), (14, 10), (-1, 10)])
def test_starts_are_rounded_to_what_is_decoded_together(start: int, found: int) -> None:
    """5 latents of 15: a start rounds to the nearest multiple that lies within."""
    _, mask = mask_strategy.apply(
        torch.zeros(1, 15, 1, 1), [torch.ones(1, 5, 1, 1)], [Placement(0, 0, 0, start, 5)], 0, 5
    )
    assert (mask == 0).nonzero().flatten().tolist() == list(range(found, found + 5))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("0,2", "reference 2, 1 were given"),
        ("0,0,0,0,11", "11 latents in a clip of 10"),
        ("0,0,0,10", "target_start 10"),
        ("0,0,6", "reference_start 6"),
        ("0,0,0,-11", "target_start -11"),
    ],
)
def test_what_cannot_be_placed_is_refused(strategy: str, message: str) -> None:
    with pytest.raises(MaskStrategyError, match=message):
        mask_strategy.apply(torch.zeros(4, 10, 2, 2), [torch.zeros(4, 6, 2, 2)], mask_strategy.parse(strategy))
    with pytest.raises(MaskStrategyError, match="does not fit"):
        mask_strategy.apply(torch.zeros(4, 10, 2, 2), [torch.zeros(4, 6, 3, 2)], [Placement()])


def test_loops_continue_each_other() -> None:
    """Loop 1 starts with the last 5 latents of loop 0; three clips of 51 frames that share 17 make 119."""
    made = torch.randn(4, 15, 2, 2)
    group = mask_strategy.continuation(reference=0, loop=1, length=5)
    latent, mask = mask_strategy.apply(torch.randn(4, 15, 2, 2), [made], [group], loop=1, align=5)
    assert torch.equal(latent[:, :5], made[:, -5:])
    assert mask.tolist() == [0] * 5 + [1] * 10
    assert mask_strategy.loop_frames(51, 3, 17) == 119
