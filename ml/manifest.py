"""Manifests: the tables about videos, shots and clips, one schema each. What we have, as `recipe.py` is what we want.

Every table is one parquet file. Paths in tables are POSIX paths relative to the workspace root unless a column says
otherwise; ids are stable over re-runs because they are digests of content and span.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

DTYPES = {"str": "str", "int": "int64", "float": "float64", "bool": "bool"}


class ManifestError(ValueError):
    """A table that does not fit its schema, naming the table, the column and the row."""


@dataclass(frozen=True)
class Column:
    """One column: name, kind (`str`, `int`, `float`, `bool`) and what it holds, with its unit."""

    name: str
    kind: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """One kind of manifest: its file name, its key column and its columns."""

    name: str
    key: str
    columns: tuple[Column, ...]

    @property
    def filename(self) -> str:
        """Name of the parquet file inside a step's folder."""
        return f"{self.name}.parquet"

    def conform(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame with this table's columns first, in order and dtype; further columns follow untouched.

        Raises ManifestError for a missing column, a null in it, or a repeated key.
        """
        names = [column.name for column in self.columns]
        missing = [name for name in names if name not in frame.columns]
        if missing:
            raise ManifestError(f"table {self.name}: missing column(s) {', '.join(missing)}")
        for name in names:
            if frame[name].isna().any():
                row = frame.index[frame[name].isna()][0]
                raise ManifestError(f"table {self.name}: column {name} has no value in row {row}")
        repeated = frame[self.key][frame[self.key].duplicated()]
        if len(repeated):
            raise ManifestError(f"table {self.name}: {self.key} {repeated.iloc[0]!r} stands there more than once")
        ordered = frame[[*names, *(c for c in frame.columns if c not in names)]]
        return ordered.astype({c.name: DTYPES[c.kind] for c in self.columns}).reset_index(drop=True)

    def empty(self) -> pd.DataFrame:
        """The table without rows."""
        return pd.DataFrame({c.name: pd.Series(dtype=DTYPES[c.kind]) for c in self.columns})

    def write(self, frame: pd.DataFrame, folder: Path) -> Path:
        """Write the conformed frame atomically into a step's folder and return the file."""
        path = folder / self.filename
        partial = path.with_suffix(".partial")
        self.conform(frame).to_parquet(partial, index=False)
        partial.replace(path)
        return path

    def read(self, *folders: Path) -> pd.DataFrame:
        """Rows of this table in the given step folders, in order; raises ManifestError for one without the file."""
        frames = []
        for folder in folders:
            path = folder / self.filename
            if not path.is_file():
                raise ManifestError(f"no {self.filename} in {folder}: the step that makes it has not finished there")
            frames.append(pd.read_parquet(path))
        return self.conform(pd.concat(frames, ignore_index=True)) if frames else self.empty()


def stable_id(*parts: object) -> str:
    """16 hex digits that depend on the parts only: same bytes and span, same id, on every machine."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def _table(name: str, key: str, text: str) -> Table:
    """A table from lines of `name kind meaning`."""
    rows = (line.split(None, 2) for line in text.strip().splitlines())
    return Table(name, key, tuple(Column(*row) for row in rows))


_ORIGIN = """
corpus           str    corpus the video belongs to
shard            str    shard of the corpus
"""
_FATE = """
status           str    ok or rejected
reason           str    why it was rejected; empty when ok
"""

VIDEOS = _table(
    "videos",
    "video_id",
    f"""
video_id         str    digest of the file's bytes (first 16 hex digits of its sha256), or of its path if unreadable
path             str    file, relative to the workspace root or absolute for a user's own corpus
sha256           str    digest of the file's bytes; empty if it could not be read
source           str    where it came from: package and version, URL, or the path that was added
licence          str    SPDX identifier
text             str    what the corpus itself says about the video; may be empty
{_ORIGIN}
width            int    pixels
height           int    pixels
fps              float  frames per second
num_frames       int    frames, counted by demuxing packets
duration_seconds float  seconds
codec            str    video codec
size_bytes       int    file size
{_FATE}""".replace("\n\n", "\n"),
)

SHOTS = _table(
    "shots",
    "shot_id",
    f"""
shot_id          str    digest of video_id and span
video_id         str    parent
{_ORIGIN}
start_frame      int    first frame in the source video
end_frame        int    one past the last frame
start_seconds    float  seconds from the start of the source video
end_seconds      float  seconds
""".replace("\n\n", "\n"),
)

CLIPS = _table(
    "clips",
    "clip_id",
    f"""
clip_id          str    digest of video_id, span and cutting settings
shot_id          str    parent shot
video_id         str    parent video
{_ORIGIN}
licence          str    licence of the parent video
text             str    the corpus's own text about the parent video
start_seconds    float  span in the source video
end_seconds      float  span in the source video
path             str    clip file; empty when rejected
sha256           str    digest of the clip file; empty when rejected
width            int    pixels
height           int    pixels
fps              float  frames per second
num_frames       int    frames in the clip file
duration_seconds float  seconds
{_FATE}""".replace("\n\n", "\n"),
)

SCORES = _table(
    "scores",
    "clip_id",
    """
clip_id          str    the clip; one float column and one `<scorer>_revision` column per scorer follow
hash             str    perceptual hash of the middle frame, 16 hex digits, for near-duplicates
""",
)

CURATED = _table(
    "curated",
    "clip_id",
    """
clip_id          str    every clip, kept or not; clip and score columns follow
keep             bool   whether it stays
reason           str    first filter that dropped it, with value and threshold; empty when kept
duplicate_of     str    clip it repeats; empty when it does not
""",
)

CAPTIONS = _table(
    "captions",
    "clip_id",
    """
clip_id          str    a kept clip
caption          str    the text
captioner        str    who wrote it
prompt           str    the instruction given to the captioner; empty for one that takes none
revision         str    revision of the captioner
""",
)

EXAMPLES = _table(
    "examples",
    "clip_id",
    """
clip_id          str    clip, unit of training
video_id         str    parent video
path             str    clip file
sha256           str    digest of the clip file
caption          str    training text
split            str    train or holdout; all clips of one video (long video: one block of it) share it
tiers            str    names of the tiers that hold it, separated by spaces
width            int    pixels
height           int    pixels
fps              float  frames per second
num_frames       int    frames
licence          str    licence
""",
)

LATENTS = _table(
    "latents",
    "key",
    """
key              str    tensor name in the shard: clip_id/resolution/HxW/T
clip_id          str    the clip
split            str    train or holdout
tiers            str    names of the tiers that hold it
resolution       str    bucket resolution name
height           int    pixels before encoding
width            int    pixels before encoding
frames           int    frames before encoding
fps              float  frames per second of the frames taken
shard            str    safetensors file beside this table
crc32            int    checksum of the bytes of the key's tensors: latent, head, tail, damaged copy
""",
)
