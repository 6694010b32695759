"""The scorers there are: each gives a clip one number. Scoring is not filtering: a score is a column kept for ever.

A new scorer is one file in this folder, one line in the registry below, and one test.
"""

from collections.abc import Callable

from ml.curation.scorers.brightness import Brightness
from ml.curation.scorers.motion import Motion
from ml.curation.scorers.scorer import Scorer, ScorerError
from ml.curation.scorers.sharpness import Sharpness
from ml.curation.scorers.text_area import TextArea

REGISTRY: dict[str, Callable[[], Scorer]] = {
    "brightness": Brightness,
    "motion": Motion,
    "sharpness": Sharpness,
    "text_area": TextArea,
}


def build(names: tuple[str, ...]) -> tuple[Scorer, ...]:
    """Scorers of these names, in order; raises ScorerError for one that is not registered."""
    unknown = [name for name in names if name not in REGISTRY]
    if unknown:
        raise ScorerError(f"curation.scores: no scorer {', '.join(unknown)}; known: {', '.join(REGISTRY)}")
    return tuple(REGISTRY[name]() for name in names)
