"""Captions: who writes them, and the hygiene that every caption goes through whoever wrote it."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd

from ml.curation.footage import Footage
from ml.curation.measure import Camera, camera_of, colours_of, vertical_colours
from ml.manifest import CAPTIONS
from ml.sections import Captions

PREAMBLE = re.compile(
    r"^\s*(?:(?:sure|certainly|okay|ok)[,.!:]\s*)?(?:here(?:'s| is) (?:a|the) (?:caption|description)[^:.]*[:.]\s*)?"
    r"(?:(?:in )?(?:the|this|these) (?:video|clip|image|images|footage|frames?)\s*"
    r"(?:(?:shows?|depicts?|features?|captures?|presents?|displays?|begins? with|opens? with|contains?)\b|,)"
    r"\s*(?:us\s+)?)?",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not)|as an ai\b|as a language model|"
    r"unable to (?:view|see|watch|access|process|describe)|cannot (?:view|see|watch|access|assist|describe))",
    re.IGNORECASE,
)
MOTION_WORDS = (
    (1.0, "almost no movement"),
    (4.0, "slow movement"),
    (15.0, "moderate movement"),
    (35.0, "fast movement"),
)
LIGHT_WORDS = ((60.0, "dark"), (100.0, "dim"), (160.0, "well-lit"), (200.0, "bright"))


class CaptionError(ValueError):
    """A captioner that does not exist."""


class Captioner(Protocol):
    """Writes one text about one clip.

    `prompt` is the instruction it is given (empty for one that takes none); `revision` changes whenever the same clip
    would get another text.
    """

    name: str
    revision: str
    prompt: str

    def caption(self, clip: Mapping[str, Any], footage: Footage) -> str:
        """The text; `clip` is a row of the curated table with its scores."""
        ...


class Measured:
    """Says what can be measured and what the corpus says itself, and nothing else.

    This is not a vision-language model: it names no object, person or action. It puts into words the optical flow,
    the camera movement fitted to it, the mean luma and the dominant colours of the clip, and its length, after the
    corpus's own text. Speeds are in picture widths: 320 px per second of `motion` is one width per second.
    """

    name = "measured"
    revision = "measured-1"
    prompt = ""

    def caption(self, clip: Mapping[str, Any], footage: Footage) -> str:
        """Two or three plain sentences."""
        light = _word(float(clip["brightness"]), LIGHT_WORDS, "very bright")
        movement = _word(float(clip["motion"]), MOTION_WORDS, "very fast movement")
        top, bottom = vertical_colours(footage.middle)
        colours = " and ".join(colours_of(footage.middle))
        place = f", {top} above and {bottom} below" if top != bottom else ""
        text = str(clip["text"]).strip()
        own = f"{text.rstrip('.')}. " if text else ""
        look = f"A {light} picture, mostly {colours}{place}."
        length = f"{float(clip['duration_seconds']):.0f} seconds"
        return f"{own}{look} {movement.capitalize()}, {_camera_words(camera_of(footage))}, {length}."


@dataclass(frozen=True)
class Cleaned:
    """A caption after hygiene; `reason` says why it cannot be used, and `mended` names what was taken out of it."""

    text: str
    reason: str = ""
    mended: tuple[str, ...] = field(default=())


REGISTRY: dict[str, type[Captioner]] = {"measured": Measured}


def build(name: str) -> Captioner:
    """The captioner of this name; raises CaptionError for an unknown one."""
    if name not in REGISTRY:
        raise CaptionError(f"curation.captions.captioner: no captioner {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]()


def clean(text: str, limits: Captions) -> Cleaned:
    """Hygiene of one caption, in a fixed order; lengths are in words.

    Control and invisible characters and odd spaces go, then preambles such as "The video shows", then sentences that
    were said before. A text that is too long is cut after its last whole sentence. A refusal, or a text that is too
    short, has a reason and is not to be used.
    """
    steps = (("control_characters", _printable), ("preamble", _without_preamble), ("repeated_sentences", _once))
    mended = []
    for name, step in steps:
        before, text = text, step(text)
        if text != " ".join(before.split()):
            mended.append(name)
    if REFUSAL.search(text):
        return Cleaned(text, "the captioner refused", tuple(mended))
    if len(text.split()) > limits.max_words:
        mended.append("cut_to_length")
        text = _fit(text, limits.max_words)
    num_words = len(text.split())
    reason = f"{num_words} words, fewer than {limits.min_words}" if num_words < limits.min_words else ""
    return Cleaned(text, reason, tuple(mended))


def hygiene_counts(cleaned: list[Cleaned]) -> dict[str, int]:
    """How many captions needed each kind of mending, and how many were refused or too short."""
    counts = Counter(name for item in cleaned for name in item.mended)
    counts["rejected"] = sum(bool(item.reason) for item in cleaned)
    return dict(sorted(counts.items()))


def tabulate(clip_ids: list[str], texts: list[Cleaned], captioner: Captioner) -> pd.DataFrame:
    """The captions table: one row for each clip whose caption can be used."""
    chosen = [(clip_id, text.text) for clip_id, text in zip(clip_ids, texts, strict=True) if not text.reason]
    rows = pd.DataFrame(chosen, columns=["clip_id", "caption"])
    how = {"captioner": captioner.name, "prompt": captioner.prompt, "revision": captioner.revision}
    return CAPTIONS.conform(rows.assign(**how))


def _word(value: float, scale: tuple[tuple[float, str], ...], beyond: str) -> str:
    return next((word for limit, word in scale if value < limit), beyond)


def _camera_words(camera: Camera) -> str:
    if camera.kind == "still":
        return "the camera is still"
    return f"the camera {camera.kind}" if camera.kind else "no single camera movement"


def _printable(text: str) -> str:
    """Normal form C, control and format characters removed, every run of white space one space."""
    spaced = "".join(" " if char.isspace() else char for char in unicodedata.normalize("NFC", text))
    return " ".join("".join(char for char in spaced if unicodedata.category(char)[0] != "C").split())


def _without_preamble(text: str) -> str:
    rest = PREAMBLE.sub("", text, count=1)
    return rest[:1].upper() + rest[1:] if rest != text else text


def _once(text: str) -> str:
    """Every sentence once, in the order of first mention; case and punctuation do not make a sentence new."""
    seen: set[str] = set()
    kept = []
    for sentence in _sentences(text):
        key = re.sub(r"\W+", " ", sentence).strip().lower()
        if key and key not in seen:
            kept.append(sentence)
        seen.add(key)
    return " ".join(kept)


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]


def _fit(text: str, max_words: int) -> str:
    """As many whole sentences as fit; where not even the first does, its first words."""
    kept: list[str] = []
    for sentence in _sentences(text):
        if len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    return " ".join(kept) if kept else " ".join(text.split()[:max_words])
