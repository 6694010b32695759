import numpy as np
import pytest

from ml.curation import captions
from ml.curation.footage import Footage
from ml.sections import Captions

LIMITS = Captions(captioner="measured", min_words=4, max_words=12)
CLIP = {"text": "", "motion": 0.2, "brightness": 30.0, "duration_seconds": 3.1}


def still(colour: tuple[int, int, int]) -> Footage:
    frames = np.full((4, 90, 160, 3), colour, np.uint8)
    return Footage(frames, frames, 1 / 12)


@pytest.mark.parametrize(
    ("text", "expected", "mended"),
    [
        ("A red\x00 bus\u200b  on\n a road.", "A red bus on a road.", ("control_characters",)),
        ("The video shows a red bus on a road.", "A red bus on a road.", ("preamble",)),
        ("In this video, we see a red bus.", "We see a red bus.", ("preamble",)),
        ("Sure! Here is a caption: The clip depicts a red bus.", "A red bus.", ("preamble",)),
        ("A bus waits. A bus waits! It leaves.", "A bus waits. It leaves.", ("repeated_sentences",)),
        ("One two three four five six. Seven eight nine ten eleven. Twelve thirteen.", None, ("cut_to_length",)),
        ("A red bus on a road.", "A red bus on a road.", ()),
        ("Sure, here is a caption: A dog runs.", "A dog runs.", ("preamble",)),
        ("The clip captured at dusk shows a lake.", "The clip captured at dusk shows a lake.", ()),
        ("The footage presented here is of a lake.", "The footage presented here is of a lake.", ()),
        ("The video showcases a used car.", "The video showcases a used car.", ()),
    ],
)
def test_hygiene_mends_one_thing_and_says_which(text, expected, mended):
    cleaned = captions.clean(text, LIMITS)
    assert cleaned.mended == mended
    assert cleaned.text == (expected or "One two three four five six. Seven eight nine ten eleven.")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't view the clip.",
        "As an AI language model, I describe text only.",
        "I am unable to see the frames you mention.",
    ],
)
def test_refusals_are_not_captions(text):
    assert captions.clean(text, LIMITS).reason == "the captioner refused"


@pytest.mark.parametrize(("text", "words"), [("A bus.", 2), ("", 0), ("The video shows", 0)])
def test_a_caption_that_says_too_little_is_rejected(text, words):
    assert captions.clean(text, LIMITS).reason == f"{words} words, fewer than 4"


def test_one_endless_sentence_is_cut_at_the_limit():
    cleaned = captions.clean(" ".join(f"word{i}" for i in range(40)), LIMITS)
    assert len(cleaned.text.split()) == 12


def test_hygiene_is_idempotent():
    once = captions.clean("The video shows a bus. A bus.  It\tleaves now.", LIMITS).text
    assert captions.clean(once, LIMITS) == captions.Cleaned(once)


def test_counts_add_up():
    texts = ["The video shows a red bus on a road.", "no", "A red bus on a road.", "The clip shows a cat on a mat."]
    assert captions.hygiene_counts([captions.clean(t, LIMITS) for t in texts]) == {"preamble": 2, "rejected": 1}


def test_measured_says_what_was_measured():
    text = captions.Measured().caption(CLIP, still((20, 40, 200)))
    assert text == "A dark picture, mostly blue. Almost no movement, the camera is still, 3 seconds."
    text = captions.Measured().caption(
        CLIP | {"motion": 20.0, "brightness": 180.0, "text": "A bus."}, still((250, 250, 250))
    )
    assert text == "A bus. A bright picture, mostly white. Fast movement, the camera is still, 3 seconds."


def test_what_measured_writes_needs_no_mending():
    limits = Captions(captioner="measured", min_words=4, max_words=60)
    text = captions.Measured().caption(CLIP | {"text": "Bikes, a test video for scene detection."}, still((90, 90, 90)))
    assert captions.clean(text, limits) == captions.Cleaned(text)


def test_the_table_leaves_out_what_cannot_be_used():
    texts = [captions.Cleaned("A red bus on a road."), captions.Cleaned("no", "1 words, fewer than 4")]
    table = captions.tabulate(["a" * 16, "b" * 16], texts, captions.Measured())
    assert table.clip_id.tolist() == ["a" * 16]
    assert table.revision.tolist() == ["measured-1"]


def test_an_unknown_captioner_names_the_known_ones():
    with pytest.raises(captions.CaptionError, match=r"'llava'; known: measured"):
        captions.build("llava")
