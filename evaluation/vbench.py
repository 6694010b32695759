"""The door to VBench: score a folder of samples, and say for each of the 16 dimensions whether the number is real.

VBench runs in an environment of its own (`evaluation/vbench_environment.py`) through a subprocess
(`evaluation/vbench_runner.py`). A dimension is `real` when VBench computed it with its own weights, else `absent` with
the reason. No number is ever made up, and nothing is downloaded: a weight file is in the cache folder or it is missing.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from evaluation.dimensions import DIMENSIONS, Dimension, dimension
from evaluation.vbench_environment import ROOT, ensure_environment

# VBench's own rule: clips of five seconds or more belong to VBench-Long, whose numbers differ (issue 134).
LONG_SECONDS = 5.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


class VBenchError(RuntimeError):
    """VBench could not be run at all; the message holds the end of what it printed."""


@dataclass(frozen=True)
class DimensionResult:
    """One dimension: a raw score in VBench's own unit and each video's, or the reason why there is none."""

    name: str
    status: Literal["real", "absent"]
    score: float | None
    per_video: Mapping[str, float]
    reason: str
    seconds: float


@dataclass(frozen=True)
class VBenchResult:
    """All 16 dimensions of one folder of samples, tool versions, and notes on how far the numbers compare."""

    dimensions: Mapping[str, DimensionResult]
    versions: Mapping[str, str]
    num_videos: int
    notes: tuple[str, ...]

    @property
    def scores(self) -> dict[str, float]:
        """Raw scores of the dimensions that are real."""
        return {name: d.score for name, d in self.dimensions.items() if d.score is not None}

    @property
    def absent(self) -> dict[str, str]:
        """Reasons of the dimensions that are absent."""
        return {name: d.reason for name, d in self.dimensions.items() if d.status == "absent"}

    def as_json(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The result from its JSON-able form."""
        dimensions = {name: DimensionResult(**fields) for name, fields in data["dimensions"].items()}
        return cls(dimensions, data["versions"], data["num_videos"], tuple(data["notes"]))


def evaluate(
    videos: Path, dimensions: Sequence[str], out: Path, cache: Path, prompts: Mapping[str, str] | None = None
) -> VBenchResult:
    """Score every .mp4 of a folder on the wanted dimensions, and write `vbench.json` into `out`.

    `cache` holds weight files laid out as VBench's own cache folder; `prompts` maps file names to the text they were
    sampled from, for dimensions that read it. Raises DimensionError for an unknown dimension, VBenchError when the
    folder has no video or the environment cannot run.
    """
    wanted = [dimension(name) for name in dimensions]
    names = sorted(path.name for path in videos.glob("*.mp4"))
    if not names:
        raise VBenchError(f"no .mp4 in {videos}: VBench has nothing to judge")
    obstacles = {d.name: obstacle(d, cache) for d in DIMENSIONS.values()}
    runnable = [d.name for d in wanted if not obstacles[d.name]]
    request = {"videos": str(videos.resolve()), "names": names, "prompts": dict(prompts or {}), "dimensions": runnable}
    answer = _run(request, out.resolve(), cache.resolve()) if runnable else {"dimensions": {}, "versions": {}}
    results = {name: _result(name, obstacles[name], answer["dimensions"]) for name in DIMENSIONS}
    result = VBenchResult(results, answer["versions"], len(names), _notes(videos, names))
    (out / "vbench.json").write_text(json.dumps(result.as_json(), indent=1), encoding="utf-8")
    return result


def obstacle(d: Dimension, cache: Path) -> str:
    """Why a dimension cannot run with the files in `cache`, or nothing."""
    missing = [name for name in d.files if not (cache / name).is_file()]
    needs = f"needs {' and '.join(missing)} in {cache.name}/ of the workspace cache" if missing else ""
    return d.obstacle or needs


def _result(name: str, reason: str, answers: Mapping[str, Any]) -> DimensionResult:
    if name not in answers:
        why = reason or "not asked for: evaluation.vbench_dimensions of the recipe does not name it"
        return DimensionResult(name, "absent", None, {}, why, 0.0)
    answer = answers[name]
    if answer["error"]:
        return DimensionResult(name, "absent", None, {}, f"VBench failed: {answer['error']}", answer["seconds"])
    return DimensionResult(name, "real", answer["score"], answer["per_video"], "", answer["seconds"])


def _run(request: Mapping[str, Any], out: Path, cache: Path) -> dict[str, Any]:
    python = ensure_environment()
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    asked, answered, log = (out / name for name in ("vbench-request.json", "vbench-answer.json", "vbench.log"))
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps({**request, "out": str(out), "cache": str(cache)}), encoding="utf-8")
    command = [str(python), "-m", "evaluation.vbench_runner", str(asked), str(answered)]
    with log.open("w", encoding="utf-8") as stream:
        environment = {**os.environ, **OFFLINE}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not answered.is_file():
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise VBenchError(f"VBench ended with code {done.returncode}; the end of {log.name}:\n{said}")
    answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answer


def _notes(videos: Path, names: Sequence[str]) -> tuple[str, ...]:
    notes = ["scored in custom-input mode on our own prompt set: not comparable with leaderboard numbers"]
    long = [name for name in names if _seconds(videos / name) >= LONG_SECONDS]
    if long:
        notes.append(f"{len(long)} of {len(names)} videos last 5 s or more, which VBench leaves to VBench-Long")
    return tuple(notes)


def _seconds(path: Path) -> float:
    import cv2

    capture = cv2.VideoCapture(str(path))
    frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return float(frames / fps) if fps else 0.0
