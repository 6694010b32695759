"""Score text, word by word as each generation writes it."""

import pytest

from ml.processes import ScoreText
from ml.score_text import aesthetic_word, motion_word, with_scores


def test_1_2_writes_numbers_with_one_decimal() -> None:
    score = ScoreText(style="v1_2", aesthetic=6.5, motion=5, camera="pan left")
    wanted = "A cat. aesthetic score: 6.5. motion score: 5.0. camera motion: pan left."
    assert with_scores("A cat.", score, 24) == wanted
    assert with_scores(wanted, score, 24) == wanted
    partly = "A cat. motion score: 1.0."
    assert (
        with_scores(partly, ScoreText(style="v1_2", aesthetic=6.54, motion=5), 24) == partly + " aesthetic score: 6.5."
    )


def test_1_3_writes_words_for_numbers_and_takes_words_as_they_are() -> None:
    score = ScoreText(style="v1_3", aesthetic=5.7, motion="fair", camera="static")
    wanted = "A cat. The aesthetic score is good. The motion strength is fair. camera motion: static."
    assert with_scores("A cat.", score, 24) == wanted
    assert with_scores(wanted, score, 24) == wanted
    assert with_scores("A cat.", ScoreText(style="v1_3", motion="21"), 24).endswith("is extremely high.")


def test_2_0_writes_the_frame_rate_and_then_the_motion_score() -> None:
    score = ScoreText(style="v2_0", motion=4)
    assert with_scores(" A cat ", score, 24.0) == "A cat. 24 FPS. 4 motion score."
    assert with_scores("A cat. 24 FPS.", score, 24) == "A cat. 24 FPS. 4 motion score."
    assert with_scores("A cat. 24 FPS. 4 motion score.", score, 24) == "A cat. 24 FPS. 4 motion score."
    assert with_scores("A cat.", ScoreText(style="v2_0"), 12) == "A cat. 12 FPS."


def test_no_style_leaves_the_prompt_alone() -> None:
    assert with_scores(" a cat", ScoreText(), 24) == " a cat"


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (3.99, "terrible"), (4, "very poor"), (4.5, "poor"), (5, "fair"), (5.5, "good"), (6, "very good"),
        (6.5, "excellent"),
    ],
)  # fmt: skip
def test_bins_of_the_aesthetic_score(score: float, word: str) -> None:
    assert aesthetic_word(score) == word


@pytest.mark.parametrize(
    ("score", "word"),
    [(0.49, "very low"), (0.5, "low"), (2, "fair"), (5, "high"), (10, "very high"), (20, "extremely high")],
)
def test_bins_of_the_motion_score(score: float, word: str) -> None:
    assert motion_word(score) == word
