"""Probing: what is in a shard, one row a video, and a reason for every video that cannot be used."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from infra.storage import sha256_of
from infra.workspace import Workspace
from ml.curation import footage
from ml.manifest import VIDEOS, stable_id

COLUMNS = ("path", "source", "licence", "text")


class ProbeError(ValueError):
    """A shard list that cannot be probed."""


@dataclass(frozen=True)
class Facts:
    """What probing found in one file: pixels (as displayed), frames per second, frames, seconds, codec."""

    width: int
    height: int
    fps: float
    num_frames: int
    duration_seconds: float
    codec: str


NOTHING = Facts(0, 0, 0.0, 0, 0.0, "")


def read_list(workspace: Workspace, corpus: str, shard: str) -> list[dict[str, str]]:
    """Rows of a shard list (path, source, licence, text); raises ProbeError for a missing, malformed or empty one."""
    path, where = workspace.shard_list(corpus, shard), f"corpus {corpus}, shard {shard}"
    if not path.is_file():
        known = ", ".join(workspace.shards(corpus)) or "none"
        raise ProbeError(f"{where} does not exist; shards of this corpus: {known}")
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ProbeError(f"{where}: {path.name} lacks column(s) {', '.join(missing)}")
        rows = [{name: row[name] or "" for name in COLUMNS} for row in reader]
    if not rows:
        raise ProbeError(f"{where} lists no videos")
    return rows


def probe_row(row: dict[str, str], workspace: Workspace) -> dict[str, Any]:
    """One row of the videos table, without corpus and shard; a file that cannot be used gets status `rejected`.

    Which licences may enter is for a recipe to say, when it cuts; a corpus serves many recipes.
    """
    path = workspace.resolve(row["path"])
    sha256, size_bytes = (sha256_of(path), path.stat().st_size) if path.is_file() else ("", 0)
    facts, reason = NOTHING, ""
    try:
        facts, reason = inspect(path)
    except (footage.FootageError, OSError) as error:
        reason = str(error)
    if not reason and not row["licence"]:
        reason = "no licence is written down for it in the shard list"
    return {
        **row,
        **vars(facts),
        "video_id": sha256[:16] or stable_id(row["path"]),
        "sha256": sha256,
        "size_bytes": size_bytes,
        "status": "rejected" if reason else "ok",
        "reason": reason,
    }


def tabulate(rows: list[dict[str, Any]], corpus: str, shard: str) -> pd.DataFrame:
    """The videos table of a shard; a file whose bytes came before is rejected, and keeps a row and an id of its own."""
    first: dict[str, str] = {}
    for index, row in enumerate(rows):
        if row["video_id"] in first:
            reason = f"same bytes as {first[row['video_id']]}" if row["sha256"] else "listed twice"
            row |= {"status": "rejected", "reason": reason, "video_id": stable_id(row["path"], index)}
        first.setdefault(row["video_id"], row["path"])
    return VIDEOS.conform(pd.DataFrame(rows).assign(corpus=corpus, shard=shard))


def inspect(path: Path) -> tuple[Facts, str]:
    """Facts of a video and the reason to reject it (empty when it is sound).

    Packets are counted by demuxing the whole file; then the last group of pictures is decoded, because a file that was
    cut off or only half downloaded still opens. Raises FootageError when it is no video at all.
    """
    with footage.Reader(path) as reader:
        packets, stated_fps, stated_frames = _packets(reader), reader.fps, reader.stream.frames
        codec = reader.stream.codec_context.name
    if not packets:
        raise footage.FootageError("the video stream holds no packets")
    span = max(packet.end_seconds for packet in packets)
    fps = stated_fps or len(packets) / span
    keyframe = max((packet.seconds for packet in packets if packet.keyframe), default=0.0)
    decoded, width, height = _tail(path, keyframe - 0.5 / fps)
    facts = Facts(width, height, fps, len(packets), span, codec)
    missing = stated_frames - len(packets)
    if missing > _slack(stated_frames):
        return facts, f"truncated: only {len(packets)} of its {stated_frames} frames are in the file"
    expected = sum(packet.seconds >= keyframe for packet in packets)
    if not decoded or expected - decoded > _slack(expected):
        return facts, f"decodes only in part: {decoded} of the {expected} frames from {keyframe:.1f} s on can be read"
    return facts, ""


@dataclass(frozen=True)
class _Packet:
    seconds: float
    end_seconds: float
    keyframe: bool


def _packets(reader: footage.Reader) -> list[_Packet]:
    found = []
    for index, packet in enumerate(reader.packets()):
        if packet.size and not packet.is_discard:
            seconds = reader.seconds(packet.pts, index)
            length = float((packet.duration or 0) * packet.time_base) or (1 / reader.fps if reader.fps else 0.0)
            found.append(_Packet(seconds, seconds + length, bool(packet.is_keyframe)))
    return found


def _tail(path: Path, start_seconds: float) -> tuple[int, int, int]:
    """Sound frames from the last keyframe on, and their width and height as displayed."""
    count = width = height = 0
    with footage.Reader(path) as reader:
        for seconds, frame in reader.frames(max(0.0, start_seconds)):
            height, width = (frame.width, frame.height) if footage.turns(frame) % 2 else (frame.height, frame.width)
            count += seconds >= start_seconds and not frame.is_corrupt
    return count, width, height


def _slack(frames: int) -> float:
    """Frames that may be missing before a file counts as damaged: containers miscount by one or two."""
    return max(2.0, 0.01 * frames)
