"""Scores as words of the prompt, exactly as each generation was trained to read them; each is added once.

1.2 writes numbers, 1.3 words for them, 2.0 the frame rate and a motion score (ou/inference_utils.py, 1.2 and 1.3;
ou/inference.py, main). The report of 1.3 calls a motion of 10 "high"; its code, followed here, "very high".
"""

import re
from collections.abc import Sequence

from ml.processes import ScoreText

# Upper ends of the bins, exclusive, and the words for them; the last word has no upper end.
AESTHETIC = ((4.0, "terrible"), (4.5, "very poor"), (5.0, "poor"), (5.5, "fair"), (6.0, "good"), (6.5, "very good"))
MOTION = ((0.5, "very low"), (2.0, "low"), (5.0, "fair"), (10.0, "high"), (20.0, "very high"))
BEST_AESTHETIC, MOST_MOTION = "excellent", "extremely high"


def with_scores(prompt: str, score: ScoreText, fps: float) -> str:
    """The prompt with the scores of its section; `fps` is what 2.0 writes as the frame rate."""
    if score.style == "v1_2":
        return _numbers(prompt, score)
    if score.style == "v1_3":
        return _words(prompt, score)
    return _rate_and_motion(prompt, score, fps) if score.style == "v2_0" else prompt


def aesthetic_word(score: float) -> str:
    """1.3's word for an aesthetic score (0 to 10)."""
    return _word(score, AESTHETIC, BEST_AESTHETIC)


def motion_word(score: float) -> str:
    """1.3's word for a motion score (mean optical flow in pixels)."""
    return _word(score, MOTION, MOST_MOTION)


def _numbers(prompt: str, score: ScoreText) -> str:
    for name, value in (("aesthetic score:", score.aesthetic), ("motion score:", score.motion)):
        if value is not None and name not in prompt:
            prompt = f"{prompt} {name} {float(value):.1f}."
    return _camera(prompt, score)


def _words(prompt: str, score: ScoreText) -> str:
    named = (("aesthetic score is", score.aesthetic, aesthetic_word), ("motion strength is", score.motion, motion_word))
    for name, value, word in named:
        if value is not None and name not in prompt:
            number = _number(value)
            prompt = f"{prompt} The {name} {value if number is None else word(number)}."
    return _camera(prompt, score)


def _camera(prompt: str, score: ScoreText) -> str:
    if score.camera is None or "camera motion:" in prompt:
        return prompt
    return f"{prompt} camera motion: {score.camera}."


def _rate_and_motion(prompt: str, score: ScoreText, fps: float) -> str:
    """A full stop, the frame rate, the motion score."""
    prompt = prompt.strip()
    prompt = prompt if prompt.endswith(".") else f"{prompt}."
    if not re.search(r"\d+ FPS\.( \d+ motion score\.)?$", prompt):
        prompt = f"{prompt} {fps:g} FPS."
    if score.motion is None or prompt.endswith("motion score."):
        return prompt
    return f"{prompt} {float(score.motion):g} motion score."


def _word(score: float, bins: Sequence[tuple[float, str]], last: str) -> str:
    return next((word for end, word in bins if score < end), last)


def _number(value: float | str) -> float | None:
    """The value as a number, or None for a word."""
    try:
        return float(value)
    except ValueError:
        return None
