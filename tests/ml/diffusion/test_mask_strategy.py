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


def test_a_long_video_is_placed_only_where_a_part_is_selected() -> None:
    film, clip = torch.randn(4, 12, 2, 2), torch.zeros(4, 10, 2, 2)
    for strategy in ("0", "0,0"):
        with pytest.raises(MaskStrategyError, match="reference 0 has 12 latent frames or more, the clip 10: cut it"):
            mask_strategy.apply(clip, [film], mask_strategy.parse(strategy))
        assert mask_strategy.apply(clip, [film[:, :10]], mask_strategy.parse(strategy))[1].tolist() == [0] + [1] * 9
    latent, _ = mask_strategy.apply(clip, [film], mask_strategy.parse("0,0,11;0,0,0,1,2"))
    assert torch.equal(latent[:, :3], film[:, [11, 0, 1]])


@pytest.mark.parametrize(
    ("strategy", "loops", "references", "message"),
    [
        ("0;2", 2, 1, r"in loop 2 of 2 \(counted from 0\): raise sampling.loops"),
        ("0,1", 1, 1, "asks for reference 1, 1 were given"),
        ("1,1", 2, 1, "asks for reference 1, 1 were given"),
        ("0;0,2,0,-1", 1, 3, "places reference 1 of 3"),
        ("", 1, 1, "places reference 0 of 1"),
    ],
)
def test_nothing_that_was_given_is_dropped(strategy: str, loops: int, references: int, message: str) -> None:
    with pytest.raises(MaskStrategyError, match=message):
        mask_strategy.check(mask_strategy.parse(strategy), loops, references)
    mask_strategy.check(mask_strategy.parse("0;1,1"), 2, 2)
    mask_strategy.check((), 1, 0)


@pytest.mark.parametrize(
    ("strategy", "align", "used"),
    [("0", None, 11), ("0,0,4,0,3", None, 7), ("0,0,4,0,3", 5, 17), ("0,0,-1", None, None), ("0,0,2;0", None, 11)],
)
def test_how_far_a_reference_is_read(strategy: str, align: int | None, used: int | None) -> None:
    """To the end of what is placed; one latent more than the clip's 10 where nothing is selected."""
    assert mask_strategy.latents_used(mask_strategy.parse(strategy), 0, 10, align) == used


@pytest.mark.parametrize("start", range(12))
def test_an_aligned_start_is_the_same_in_as_much_as_is_read(start: int) -> None:
    film, clip = torch.randn(1, 60, 1, 1), torch.zeros(1, 10, 1, 1)
    groups = mask_strategy.parse(f"0,0,{start},0,4")
    used = mask_strategy.latents_used(groups, 0, 10, 5)
    whole, read = (mask_strategy.apply(clip, [part], groups, 0, 5)[0] for part in (film, film[:, :used]))
    assert torch.equal(whole, read)


def test_loops_continue_each_other() -> None:
    """Loop 1 starts with the last 5 latents of loop 0; three clips of 51 frames that share 17 make 119."""
    made = torch.randn(4, 15, 2, 2)
    group = mask_strategy.continuation(reference=0, loop=1, length=5)
    latent, mask = mask_strategy.apply(torch.randn(4, 15, 2, 2), [made], [group], loop=1, align=5)
    assert torch.equal(latent[:, :5], made[:, -5:])
    assert mask.tolist() == [0] * 5 + [1] * 10
    assert mask_strategy.loop_frames(51, 3, 17) == 119
