"""Votes of people: one CSV file a recipe in the workspace, only ever appended to."""

import csv
import fcntl
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

Choice = Literal["left", "right", "tie"]


class VoteError(ValueError):
    """A vote file that cannot be read, naming the line."""


@dataclass(frozen=True)
class Vote:
    """One answer: which pair, which model stood on which side, the axis asked about, the choice, how long it took.

    `voter` is a hash, so that a person's answers belong together without saying who it is; `at` is Unix time.
    """

    pair: str
    left_model: str
    right_model: str
    axis: str
    choice: Choice
    voter: str
    seconds: float
    at: float

    @property
    def preferred(self) -> str:
        """The model that was preferred, or `tie`."""
        return {"left": self.left_model, "right": self.right_model, "tie": "tie"}[self.choice]


def votes_file(workspace: Path, recipe_id: str) -> Path:
    """Where the votes about a recipe's samples lie."""
    return workspace / "votes" / f"{recipe_id}.csv"


def append_votes(path: Path, votes: Sequence[Vote]) -> None:
    """Append votes; safe when several people vote at once, because the file is locked while lines are added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = csv.DictWriter(stream, [f.name for f in fields(Vote)])
        # The place is that of the moment it was opened: another voter may have begun the file since.
        if stream.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerows(asdict(vote) for vote in votes)


def read_votes(path: Path) -> list[Vote]:
    """Every vote so far, oldest first, none when nobody voted; raises VoteError naming the first bad line."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [_vote(row, number, path) for number, row in enumerate(csv.DictReader(stream), start=2)]


def voter_hash(session: str) -> str:
    """A voter's pseudonym from whatever the page knows of the session."""
    return hashlib.sha256(f"opensora-voter:{session}".encode()).hexdigest()[:16]


def now() -> float:
    """Unix time, for a vote's `at`."""
    return round(time.time(), 3)


def _vote(row: dict[str, str], number: int, path: Path) -> Vote:
    try:
        vote = Vote(**{**row, "seconds": float(row["seconds"]), "at": float(row["at"])})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise VoteError(f"{path}, line {number} is not a vote: {error}") from error
    if vote.choice not in get_args(Choice):
        raise VoteError(f"{path}, line {number}: choice {vote.choice!r} is none of {', '.join(get_args(Choice))}")
    return vote
