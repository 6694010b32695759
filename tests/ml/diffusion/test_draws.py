"""What training samples are given, generation by generation."""

from collections import Counter

import pytest
import torch

from ml.diffusion import conditions
from ml.diffusion.draws import Conditioner, Draw, Ends, draw_given, draw_mask
from ml.processes import IDDPM, KINDS, AreaShift, DropGiven, LinearShift, RectifiedFlow

MASKED = {"t2v": 0.8, "random": 0.05, "intepolate": 0.005, "quarter_head": 0.045, "image_head": 0.1}
V1_3 = RectifiedFlow(
    law="v1_3", shift=AreaShift(law="v1_3"), drop_context=0.1, drop_given=DropGiven(), x_cond_weight=0.1
)
V2_0 = RectifiedFlow(law="v2_0", sigma_min=1e-5, shift=LinearShift(), drop_context=0.3)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _masks(kind: str, frames: int, count: int = 400) -> list[list[int]]:
    generator = _generator()
    return [draw_mask({kind: 1.0}, frames, generator)[1].nonzero().flatten().tolist() for _ in range(count)]


def test_kinds_of_1_1_and_1_2_are_drawn_by_weight() -> None:
    generator = _generator()
    counts = Counter(draw_mask(MASKED, 16, generator)[0] for _ in range(8000))
    assert {kind: counts[kind] / 8000 for kind in MASKED} == pytest.approx(MASKED, abs=0.015)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("image_head", [[0]]),
        ("image_tail", [[15]]),
        ("image_head_tail", [[0, 15]]),
        ("image_random", [[i] for i in range(16)]),
        ("quarter_head", [list(range(n)) for n in (1, 2, 3, 4)]),
        ("quarter_tail", [list(range(16 - n, 16)) for n in (1, 2, 3, 4)]),
        ("quarter_head_tail", [[*range(n), *range(16 - n, 16)] for n in (1, 2, 3, 4)]),
        ("quarter_random", [list(range(s, s + n)) for n in (1, 2, 3, 4) for s in range(17 - n)]),
        ("intepolate", [list(range(0, 16, 2)), list(range(1, 16, 2))]),
        ("t2v", [[]]),
    ],
)
def test_masks_of_sixteen_frames(kind: str, expected: list[list[int]]) -> None:
    """Every mask that may come does come, and no other."""
    found = {tuple(mask) for mask in _masks(kind, 16, 2000)}
    assert found == {tuple(mask) for mask in expected}


def test_random_masks_give_a_tenth_to_nine_tenths() -> None:
    """The share given is uniform in 0.1 to 0.9: half of the frames on average, and widely spread."""
    shares = torch.tensor([len(mask) / 64 for mask in _masks("random", 64, 2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.std().item() == pytest.approx((0.8**2 / 12 + 0.25 / 64 * 0.85) ** 0.5, abs=0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS["mask"]])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_something_is_left_to_make(kind: str, frames: int) -> None:
    assert all(len(mask) < frames for mask in _masks(kind, frames, 50))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("i2v_head", [[0]]),
        ("i2v_tail", [[6]]),
        ("i2v_loop", [[0, 6]]),
        ("v2v_head", [[0, 1, 2]]),
        ("v2v_head_noisy", [[0, 1, 2]]),
        ("v2v_tail", [[3, 4, 5, 6]]),
        ("other", [list(range(n)) for n in range(1, 6)] + [list(range(n, 7)) for n in range(1, 6)]),
        ("t2v", [[]]),
    ],
)
def test_kinds_of_1_3_over_seven_latents(kind: str, expected: list[list[int]]) -> None:
    generator = _generator()
    found = {draw_given({kind: 1.0}, 7, generator)[1] for _ in range(500)}
    assert found == {tuple(indices) for indices in expected}


@pytest.mark.parametrize("kind", [kind for kind in KINDS["embed"]])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_of_1_3_have_something_left_to_make(kind: str, frames: int) -> None:
    generator = _generator()
    assert all(len(draw_given({kind: 1.0}, frames, generator)[1]) < frames for _ in range(20))


def test_masked_frames_are_not_active_and_not_learned() -> None:
    latents = torch.randn(6, 4, 16, 2, 2)
    drawn = Conditioner("mask", {"image_head": 1.0}, IDDPM()).draw(latents, _generator())
    assert drawn.active is not None
    assert drawn.active.tolist() == [[False] + [True] * 15] * 6
    assert drawn.weights is not None
    assert torch.equal(drawn.weights, drawn.active.float())
    assert drawn.condition is None


def test_nothing_given_is_an_empty_draw() -> None:
    latents = torch.randn(2, 4, 5, 2, 2)
    assert Conditioner("channels", {"t2v": 1.0}, V2_0).draw(latents, _generator()) == Draw()
    assert Conditioner("none", {"t2v": 1.0}, IDDPM()).draw(latents, _generator()) == Draw()
    assert Conditioner("embed", {"i2v_head": 1.0}, V1_3).draw(latents[:, :, :1], _generator()) == Draw()


def test_1_3_shows_given_latents_weighs_them_and_drops_text_or_latents() -> None:
    """Of every hundred samples five lose their text, five their latents, five both; the mask is shown all the same."""
    latents = torch.randn(4000, 1, 5, 1, 1)
    drawn = Conditioner("embed", {"i2v_head": 1.0}, V1_3).draw(latents, _generator())
    assert drawn.given == (0,)
    assert drawn.condition is not None
    assert (drawn.condition[:, 0, 0] == 1).all()
    assert (drawn.condition[:, :, 1:] == 0).all()
    blank = (drawn.condition[:, 1, 0] == 0).flatten()
    kept = drawn.condition[~blank, 1, 0]
    assert torch.equal(kept, latents[~blank, 0, 0])
    assert drawn.drop_text is not None
    assert drawn.drop_text.float().mean().item() == pytest.approx(0.10, abs=0.015)
    assert blank.float().mean().item() == pytest.approx(0.10, abs=0.015)
    assert (blank & drawn.drop_text).float().mean().item() == pytest.approx(0.05, abs=0.012)
    assert drawn.weights is not None
    assert drawn.weights[0].tolist() == pytest.approx([0.1, *[4.9 / 4] * 4])


def test_1_3_is_given_pictures_encoded_alone() -> None:
    """i2v kinds show the first and last frame as a person gives them; v2v kinds show the clip's own latents."""
    latents, heads, tails = torch.randn(3, 4, 5, 2, 2), torch.randn(3, 4, 1, 2, 2), torch.randn(3, 4, 1, 2, 2)
    plain = V1_3.model_copy(update={"drop_given": None})
    shown = {}
    for kind in ("i2v_head", "i2v_tail", "i2v_loop", "v2v_head"):
        condition = Conditioner("embed", {kind: 1.0}, plain).draw(latents, _generator(), Ends(heads, tails)).condition
        assert condition is not None
        shown[kind] = condition[:, 1:]
    for kind, first, last in (("i2v_head", True, False), ("i2v_tail", False, True), ("i2v_loop", True, True)):
        assert torch.equal(shown[kind][:, :, :1], heads if first else torch.zeros_like(heads))
        assert torch.equal(shown[kind][:, :, -1:], tails if last else torch.zeros_like(tails))
    assert torch.equal(shown["v2v_head"][:, :, :2], latents[:, :, :2])
    alone = Conditioner("embed", {"i2v_head": 1.0}, plain).draw(latents, _generator()).condition
    assert alone is not None
    assert torch.equal(alone[:, 1:, 0], latents[:, :, 0])


def test_noisy_references_of_1_3_have_a_tenth_to_three_tenths_of_noise() -> None:
    latents = torch.zeros(1, 8, 6, 16, 16)
    plain = V1_3.model_copy(update={"drop_given": None})
    generator, spreads = _generator(), []
    for _ in range(200):
        drawn = Conditioner("embed", {"v2v_head_noisy": 1.0}, plain).draw(latents, generator)
        assert drawn.condition is not None
        spreads.append(drawn.condition[0, 1:, :3].std().item())
    assert min(spreads) > 0.09
    assert max(spreads) < 0.31
    assert sum(spreads) / len(spreads) == pytest.approx(0.2, abs=0.015)


def test_2_0_draws_a_kind_a_sample_and_gives_pictures_encoded_alone() -> None:
    latents, heads, tails = torch.randn(32, 4, 5, 2, 2), torch.randn(32, 4, 1, 2, 2), torch.randn(32, 4, 1, 2, 2)
    conditioner = Conditioner("channels", {"t2v": 1, "i2v_head": 5, "i2v_loop": 1}, V2_0)
    drawn = conditioner.draw(latents, _generator(3), Ends(heads, tails))
    kinds = conditions.draw({"t2v": 1, "i2v_head": 5, "i2v_loop": 1}, 32, _generator(3))
    assert drawn.condition is not None
    assert torch.equal(drawn.condition, conditions.condition(latents, kinds, heads, tails))
    row = kinds.index("i2v_loop")
    assert torch.equal(drawn.condition[row, 1:, 0], heads[row, :, 0])
    assert torch.equal(drawn.condition[row, 1:, 4], tails[row, :, 0])
    assert drawn.weights is None
