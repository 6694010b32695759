"""What a scorer is."""

from typing import Protocol

from ml.curation.footage import Footage


class ScorerError(ValueError):
    """A scorer that does not exist."""


class Scorer(Protocol):
    """Gives a clip one number; called from several threads at once.

    `name` is the column; `revision` changes whenever the same clip would get another number (method, weights, version).
    """

    name: str
    revision: str
    unit: str

    def score(self, footage: Footage) -> float:
        """The clip's number, in `unit`."""
        ...
