"""Clips: shots cut to the recipe's length, frame rate and size, each written once and under a stable name.

A source is decoded in order, once; a long one is divided among the cores, each beginning at a keyframe. A clip that
could not be cut stays in the table with its reason.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd

from infra.storage import sha256_of
from infra.workspace import Workspace
from ml.curation import footage
from ml.manifest import CLIPS, stable_id
from ml.sections import Clips

GROUP_SECONDS = 30.0
# x264 is deterministic on one thread but for one thing: on AVX2 machines its macroblock-tree rate control reads memory
# that nobody wrote (PyAV 18.1: one clip in six got other bytes in a second run). So that stays off.
ENCODER = {"preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
EPSILON_SECONDS = 1e-4


@dataclass(frozen=True)
class Plan:
    """One clip to be: its id, its span in the source, and where it goes."""

    clip_id: str
    shot_id: str
    start_seconds: float
    end_seconds: float
    path: Path

    @property
    def seconds(self) -> float:
        """Length of the span."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True)
class Group:
    """Consecutive clips of one video that one core cuts in one pass."""

    source: Path
    video: dict[str, Any]
    plans: tuple[Plan, ...]

    @property
    def seconds(self) -> float:
        """Footage in the group."""
        return sum(plan.seconds for plan in self.plans)


def plan_groups(
    videos: pd.DataFrame, shots: pd.DataFrame, settings: Clips, workspace: Workspace, out: Path
) -> list[Group]:
    """Every clip to be cut, in groups of about half a minute of one video."""
    groups = []
    for video in videos[videos.status == "ok"].to_dict("records"):
        plans: list[Plan] = []
        for shot in shots[shots.video_id == video["video_id"]].sort_values("start_seconds").to_dict("records"):
            plans += _plans(video, shot, settings, out)
        source = workspace.resolve(video["path"])
        groups += [Group(source, video, chunk) for chunk in _chunks(plans)]
    return groups


def spans(start_seconds: float, end_seconds: float, settings: Clips) -> list[tuple[float, float]]:
    """Spans of the clips that a shot gives: equal parts no longer than the maximum.

    Where equal parts would fall below the minimum, parts of the maximum length and a remainder.
    """
    length = end_seconds - start_seconds
    parts = max(1, math.ceil(length / settings.max_seconds - EPSILON_SECONDS))
    step = length / parts if length / parts >= settings.min_seconds else settings.max_seconds
    edges = [start_seconds + step * i for i in range(parts)] + [end_seconds]
    return list(pairwise(edges))


def cut(group: Group, settings: Clips, licences: Sequence[str], workspace: Workspace) -> list[dict[str, Any]]:
    """Cut a group and return its rows of the clips table; clips that an earlier attempt finished are kept as they are.

    Footage of a licence that the recipe does not allow is not even opened.
    """
    refusal = _forbidden(str(group.video["licence"]), licences)
    reasons = {plan.clip_id: refusal or _too_short(plan, settings) for plan in group.plans}
    wanted = [plan for plan in group.plans if not reasons[plan.clip_id] and not _finished(plan)]
    if wanted:
        try:
            with footage.Reader(group.source) as reader:
                reasons |= _write_all(reader, wanted, settings, float(group.video["fps"]))
        except (footage.FootageError, av.FFmpegError, OSError) as error:
            reasons |= {plan.clip_id: f"the source cannot be read: {error}" for plan in wanted if not _finished(plan)}
    return [_row(plan, group.video, reasons[plan.clip_id], workspace) for plan in group.plans]


def clip_size(width: int, height: int, pixel_aspect: float, short_side_px: int) -> tuple[int, int]:
    """Width and height of a clip: square pixels, even sides, the shorter at most `short_side_px`, never enlarged."""
    true_width = width * pixel_aspect
    scale = min(1.0, short_side_px / min(true_width, height))
    return max(2, round(true_width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def tabulate(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The clips table of a shard."""
    return CLIPS.conform(pd.DataFrame(rows)) if rows else CLIPS.empty()


def _plans(video: dict[str, Any], shot: dict[str, Any], settings: Clips, out: Path) -> Iterator[Plan]:
    how = (settings.fps, settings.short_side_px, settings.crf, *ENCODER.values())
    for start, end in spans(shot["start_seconds"], shot["end_seconds"], settings):
        clip_id = stable_id(video["video_id"], f"{start:.4f}", f"{end:.4f}", *how)
        yield Plan(clip_id, shot["shot_id"], start, end, out / "clips" / f"{clip_id}.mp4")


def _chunks(plans: Sequence[Plan]) -> Iterator[tuple[Plan, ...]]:
    chunk: list[Plan] = []
    for plan in plans:
        chunk.append(plan)
        if sum(p.seconds for p in chunk) >= GROUP_SECONDS:
            yield tuple(chunk)
            chunk = []
    if chunk:
        yield tuple(chunk)


def _forbidden(licence: str, licences: Sequence[str]) -> str:
    return "" if licence in licences else f"licence {licence} is not allowed by this recipe (corpus.licences)"


def _too_short(plan: Plan, settings: Clips) -> str:
    if plan.seconds >= settings.min_seconds - EPSILON_SECONDS:
        return ""
    return f"{plan.seconds:.2f} s is shorter than {settings.min_seconds:g} s"


def _finished(plan: Plan) -> bool:
    """A file in place was renamed after it was closed, so it is whole; opening it guards against a damaged disk."""
    try:
        footage.open_container(plan.path).close()
    except footage.FootageError:
        return False
    return True


def _write_all(reader: footage.Reader, plans: Sequence[Plan], settings: Clips, source_fps: float) -> dict[str, str]:
    """Write every plan in one pass over the source; reasons by clip id, empty where it went well."""
    fps = Fraction(min(settings.fps, source_fps)).limit_denominator(1001)
    reasons = {plan.clip_id: "decoding ended before the clip began" for plan in plans}
    queue = list(plans)
    writer: _Writer | None = None
    for seconds, frame in reader.frames(plans[0].start_seconds):
        middle = seconds + 0.5 / source_fps
        if writer and middle >= writer.plan.end_seconds:
            reasons[writer.plan.clip_id], writer = writer.close(reader.broken), None
        if writer is None and not queue:
            break
        if writer is None and middle >= queue[0].start_seconds:
            aspect = float(reader.stream.sample_aspect_ratio or 1)
            size = clip_size(frame.width, frame.height, aspect, settings.short_side_px)
            writer = _Writer(queue.pop(0), frame, _Look(fps, size, settings.crf))
        if writer:
            writer.show(frame, middle)
    if writer:
        reasons[writer.plan.clip_id] = writer.close(reader.broken)
    return reasons


@dataclass(frozen=True)
class _Look:
    """Frame rate, width and height before the picture is turned upright, x264 quality."""

    fps: Fraction
    size: tuple[int, int]
    crf: int


class _Writer:
    """Writes one clip at a constant frame rate to a partial file, and renames it when it is whole."""

    def __init__(self, plan: Plan, frame: Any, look: _Look) -> None:
        self.plan, self._look, self._count = plan, look, 0
        plan.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = plan.path.with_suffix(".partial")
        self._turns = footage.turns(frame)
        self._container = av.open(str(self._partial), "w", format="mp4")
        self._stream = self._add_stream(frame)

    def _add_stream(self, frame: Any) -> Any:
        stream = self._container.add_stream("libx264", rate=self._look.fps)
        width, height = self._look.size
        stream.width, stream.height = (height, width) if self._turns % 2 else (width, height)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(self._look.crf), **ENCODER}
        context = stream.codec_context
        context.thread_count = 1
        if not self._turns:  # same matrix in, same matrix out: colours read back as they were
            context.colorspace, context.color_range = frame.colorspace, frame.color_range
            context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
        return stream

    def show(self, frame: Any, until_seconds: float) -> None:
        """Write this frame for every tick of the clip's clock that falls before `until_seconds`."""
        picture = None
        while self._count < self._wanted and self._tick() < until_seconds:
            picture = picture or self._scaled(frame)
            picture.pts, picture.time_base = self._count, 1 / self._look.fps
            self._container.mux(self._stream.encode(picture))
            self._count += 1

    def _tick(self) -> float:
        return self.plan.start_seconds + float(self._count / self._look.fps)

    @property
    def _wanted(self) -> int:
        return max(1, round(self.plan.seconds * self._look.fps))

    def _scaled(self, frame: Any) -> Any:
        scaled = frame.reformat(*self._look.size, format="yuv420p", interpolation="AREA")
        if not self._turns:
            scaled.pict_type = 0  # the encoder chooses; the source's key frames mean nothing here
            return scaled
        upright = np.ascontiguousarray(np.rot90(scaled.to_ndarray(format="rgb24"), k=self._turns))
        return av.VideoFrame.from_ndarray(upright, format="rgb24").reformat(format="yuv420p")

    def close(self, broken: Sequence[float]) -> str:
        """Finish the file; the reason to reject it, or nothing."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        reason = self._reason(broken)
        if reason:
            self._partial.unlink()
        else:
            self._partial.replace(self.plan.path)
        return reason

    def _reason(self, broken: Sequence[float]) -> str:
        damage = [s for s in broken if self.plan.start_seconds <= s < self.plan.end_seconds]
        if damage:
            return f"{len(damage)} damaged frame(s), the first at {damage[0]:.2f} s of the source"
        if self._count < self._wanted - 1:
            return f"decoding ended after {self._count} of {self._wanted} frames"
        return ""


def _row(plan: Plan, video: dict[str, Any], reason: str, workspace: Workspace) -> dict[str, Any]:
    origin = {key: video[key] for key in ("video_id", "corpus", "shard", "licence", "text")}
    row = {
        "clip_id": plan.clip_id,
        "shot_id": plan.shot_id,
        **origin,
        "start_seconds": round(plan.start_seconds, 6),
        "end_seconds": round(plan.end_seconds, 6),
        "status": "rejected" if reason else "ok",
        "reason": reason,
    }
    return row | (_absent() if reason else _measured(plan.path, workspace))


def _absent() -> dict[str, Any]:
    numbers = {"width": 0, "height": 0, "fps": 0.0, "num_frames": 0, "duration_seconds": 0.0}
    return {"path": "", "sha256": "", **numbers}


def _measured(path: Path, workspace: Workspace) -> dict[str, Any]:
    """What the finished file really holds, read back from it."""
    with footage.Reader(path) as reader:
        num_frames, fps = sum(1 for packet in reader.packets() if packet.size), reader.fps
        width, height = reader.stream.codec_context.width, reader.stream.codec_context.height
    return {
        "path": workspace.relative(path),
        "sha256": sha256_of(path),
        "width": width,
        "height": height,
        "fps": fps,
        "num_frames": num_frames,
        "duration_seconds": num_frames / fps,
    }
