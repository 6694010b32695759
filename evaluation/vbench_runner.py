"""Runs inside `.venv-vbench`: read a request (JSON file), let VBench score the videos, write the answer (JSON file).

Called as `python -m evaluation.vbench_runner REQUEST ANSWER` from the repository root by `evaluation/vbench.py`. It
imports nothing of this house, whose packages are not installed there. VBench fetches weights by itself when they are
missing; the caller has checked that they are there, and a hook here refuses every attempt to reach a network.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FETCHERS = ("wget", "curl", "git")
PERCENT = ("imaging_quality",)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class NetworkRefusedError(RuntimeError):
    """VBench tried to download something in a run that must not reach a network."""


def main(request_path: Path, answer_path: Path) -> None:
    """Score every dimension of the request; a dimension that raises is answered with its error, the others go on."""
    request = json.loads(request_path.read_text(encoding="utf-8"))
    os.environ["VBENCH_CACHE_DIR"] = request["cache"]
    sys.addaudithook(refuse_network)
    shim = install_shim()
    _offer_vocabulary(Path(request["cache"]))
    answer: dict[str, Any] = {"dimensions": {}, "versions": {**_versions(), "torchvision_ops": shim}}
    for number, name in enumerate(request["dimensions"], start=1):
        print(f"vbench {number}/{len(request['dimensions'])}: {name}", file=sys.stderr, flush=True)
        answer["dimensions"][name] = _timed(name, request)
    partial = answer_path.with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(answer_path)


def refuse_network(event: str, arguments: Sequence[Any]) -> None:
    """Audit hook: raise on a connection, a name look-up, or a child process whose purpose is to fetch."""
    fetches = event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name in FETCHERS
    remote = event == "socket.connect" and isinstance(arguments[1], tuple)
    if fetches or remote or event == "socket.getaddrinfo":
        raise NetworkRefusedError(f"a weight file is missing and VBench wanted to fetch it ({event})")


def install_shim() -> str:
    """Make `import torchvision` work beside a CPU build of torch; returns `native` or `python`.

    The torchvision wheel in the package index is built against CUDA. Where its library cannot load, importing it fails
    because two operators are unknown; defining them first is enough, since no dimension calls them on this path.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except (RuntimeError, OSError):
        for name in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return "native"
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
        library.impl(operator, greedy_suppression, "CPU")
    _KEPT_ALIVE.append(library)
    return "python"


_KEPT_ALIVE: list[Any] = []  # operators vanish when their library object is collected


def greedy_suppression(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """Non-maximum suppression: indices of boxes [N, 4] (x1 y1 x2 y2) by falling score, without overlapping ones.

    A box is dropped when its intersection over union with a kept one exceeds `iou_threshold`. Returns int64 [K].
    """
    import torch

    corner, opposite = boxes[:, None, :2], boxes[:, None, 2:]
    inner = torch.minimum(opposite, boxes[None, :, 2:]) - torch.maximum(corner, boxes[None, :, :2])
    shared = inner.clamp(min=0).prod(dim=-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
    overlap = shared / (area[:, None] + area[None, :] - shared)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if alive[index]:
            kept.append(index)
            alive &= overlap[index] <= iou_threshold
    return torch.tensor(kept, dtype=torch.long)


def _timed(name: str, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        score, per_video = _score(name, request)
        answer: dict[str, Any] = {"score": score, "per_video": per_video, "error": ""}
    except Exception as error:
        answer = {"score": None, "per_video": {}, "error": f"{type(error).__name__}: {error}"}
    return {**answer, "seconds": round(time.perf_counter() - started, 3)}


def _score(name: str, request: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """VBench's own score of one dimension and of each video; raises ValueError when VBench left a video out."""
    import torch
    from vbench import VBench

    out = Path(request["out"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suite = VBench(device, "", str(out))
    folder, prompts = request["videos"], request["prompts"]
    with torch.no_grad():
        suite.evaluate(folder, name, prompts, dimension_list=[name], local=True, mode="custom_input")
    score, rows = json.loads((out / f"{name}_eval_results.json").read_text(encoding="utf-8"))[name]
    unit = 100.0 if name in PERCENT else 1.0
    per_video = {Path(row["video_path"]).name: float(row["video_results"]) / unit for row in rows}
    skipped = sorted(set(request["names"]) - set(per_video))
    if skipped:
        raise ValueError(f"VBench could not read {len(skipped)} of {len(request['names'])} videos: {skipped[:5]}")
    return float(score), per_video


def _offer_vocabulary(cache: Path) -> None:
    """ViCLIP looks for CLIP's vocabulary in the cache folder; the installed `clip` package has the same file."""
    target = cache / "ViCLIP" / VOCABULARY
    found = [f for f in importlib.metadata.files("openai-clip") or [] if f.name == VOCABULARY]
    if found and not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(found[0].locate()), target)


def _versions() -> dict[str, str]:
    names = ("vbench", "torch", "torchvision", "numpy", "opencv-python")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
