"""Sampling and judging networks: `python -m ml.sample samples | losses | reconstruct`.

`samples` makes videos of prompts, `losses` measures the held-out loss of every stage beside the untrained network's,
`reconstruct` measures what the autoencoder gives back of held-out clips.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from infra.storage import atomic_write
from infra.workspace import Workspace
from ml.batching.buckets import Bucketing
from ml.batching.datasets import ClipDataset, LatentDataset, to_frames, to_video
from ml.batching.video import Frames, read_clip, write_clip
from ml.diffusion.process import build_process
from ml.engines.make import device_of
from ml.entry import Call, CallError, lpips_weights, parse
from ml.metrics import psnr, ssim
from ml.models.lpips import load_lpips
from ml.models.text import build_text_encoder
from ml.pictures import Strip, curves, sheet, spread
from ml.recipe import Recipe
from ml.sampling.generator import Generator, Networks
from ml.sampling.requests import Request, read_requests
from ml.shapes import Size
from ml.training.held_out import Grid, HeldOut, chosen_clips, even_times, held_out_loss
from ml.training.networks import open_autoencoder, open_transformer

SHEET_FRAMES = 4
SHEET_CLIPS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one call."""
    call = parse(argv, ("samples", "losses", "reconstruct"), "Sample from networks, and measure them.")
    {"samples": make_samples, "losses": measure_losses, "reconstruct": measure_reconstruction}[call.op](call)
    return 0


# --- samples ------------------------------------------------------------------------------------------------------


def make_samples(call: Call) -> None:
    """A video for every request and seed, their table, and a contact sheet; videos already there are kept."""
    generator = Generator(call.recipe, open_networks(call))
    requests, seeds = requests_of(call), call.recipe.evaluation.seeds
    (call.out / "videos").mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    made = 0
    with tqdm(total=len(requests) * len(seeds), desc="samples", unit="video", mininterval=1.0) as bar:
        for index, request in enumerate(requests):
            paths = {seed: call.out / "videos" / f"{index}-{seed}.mp4" for seed in seeds}
            missing = [seed for seed, path in paths.items() if not path.is_file()]
            if missing:
                for seed, frames in zip(missing, generator.videos(request, missing), strict=True):
                    write_clip(paths[seed], frames, call.recipe.sampling.fps)
                made += len(missing)
            rows += [row_of(generator, index, request, seed, path) for seed, path in paths.items()]
            bar.update(len(seeds))
            call.log.heartbeat()
    pd.DataFrame(rows).to_parquet(call.out / "samples.parquet", index=False)
    strips = [
        Strip(part.prompt, [_frames_of(call.out / r["path"], generator.size) for r in rows if r["prompt_index"] == i])
        for i, part in enumerate(requests)
    ]
    seeds_named = ", ".join(map(str, seeds))
    sheet(
        strips,
        call.out / "contact_sheet.png",
        title=f"{call.recipe.id}: {SHEET_FRAMES} frames of each seed ({seeds_named})",
    )
    evaluations = float(generator.plan.evaluations * generator.sampling.loops)
    call.finish(
        metrics={"samples": float(len(rows)), "samples_made": float(made), "evaluations": evaluations},
        facts={"size": str(generator.size), "frames": generator.frames, "shift": generator.plan.shift},
        pictures=["contact_sheet.png"],
    )


def row_of(generator: Generator, index: int, request: Request, seed: int, path: Path) -> dict[str, Any]:
    """The row of one video in `samples.parquet`."""
    return {
        "prompt": request.prompt,
        "prompt_index": index,
        "seed": seed,
        "path": f"{path.parent.name}/{path.name}",
        "frames": generator.frames,
        "height": generator.size.height,
        "width": generator.size.width,
        "fps": float(generator.sampling.fps),
    }


def open_networks(call: Call) -> Networks:
    """The networks of a call's step folders, on the device that samples."""
    recipe, device = call.recipe, device_of(call.recipe.compute.sample)
    return Networks(
        open_transformer(recipe, call.input("checkpoint")).to(device),
        open_autoencoder(recipe, call.input("autoencoder")).to(device),
        build_text_encoder(recipe.text, Workspace(call.workspace).cache / "text", str(device)),
    )


def requests_of(call: Call) -> list[Request]:
    """The requests of `--option prompts=FILE`, or of `prompts.json` in `--input prompts=FOLDER`."""
    given = "prompts" in call.options
    return read_requests(Path(call.option("prompts")) if given else call.input("prompts") / "prompts.json")


def _frames_of(path: Path, size: Size) -> Frames:
    return spread(read_clip(path, None, size), SHEET_FRAMES)


# --- losses -------------------------------------------------------------------------------------------------------


def measure_losses(call: Call) -> None:
    """Held-out loss of the untrained network and of every stage's checkpoint: `losses.json` and `losses.png`."""
    recipe, device = call.recipe, device_of(call.recipe.compute.evaluate)
    names = call.option("stages").split(",")
    folders = [folder for name, found in call.inputs.items() if name == "checkpoint" for folder in found]
    if len(names) != len(folders):
        raise CallError(f"losses needs one --input checkpoint for each of --option stages: {len(folders)} for {names}")
    latents = LatentDataset(call.input("latents"))
    keys = chosen_clips(latents.groups("holdout"), recipe.evaluation.loss_clips, recipe.seed)
    times = even_times(recipe.evaluation.loss_timesteps)
    grid = Grid(keys, times, recipe.seed, build_process(recipe.objective), recipe.told_guidance)
    found: dict[str, HeldOut] = {}
    networks = [("untrained", None), *zip(names, folders, strict=True)]
    for name, folder in tqdm(networks, desc="held-out loss", unit="network"):
        found[name] = held_out_loss(open_transformer(recipe, folder).to(device), latents, grid, device)
        call.log.heartbeat()
    document = {
        "held_out": found[names[-1]].mean,
        "untrained": found["untrained"].mean,
        "by_stage": {name: result.mean for name, result in found.items() if name != "untrained"},
        "by_timestep": {name: result.by_timestep for name, result in found.items()},
        "by_bucket": {name: result.by_bucket for name, result in found.items()},
        "timesteps": list(grid.times),
        "num_clips": len({key.split("/")[0] for part in keys.values() for key in part}),
        "num_latents": grid.num_latents,
    }
    atomic_write(call.out / "losses.json", json.dumps(document, indent=2))
    labels = (f"{recipe.id}: held-out loss", "time (0 data, 1 noise)", "mean squared error")
    curves({name: result.by_timestep for name, result in found.items()}, grid.times, labels, call.out / "losses.png")
    metrics = {f"loss_{name}": result.mean for name, result in found.items()}
    call.finish(
        {**metrics, "held_out": found[names[-1]].mean, "num_latents": float(grid.num_latents)}, pictures=["losses.png"]
    )


# --- reconstruction -----------------------------------------------------------------------------------------------


def measure_reconstruction(call: Call) -> None:
    """PSNR, SSIM and LPIPS of held-out clips through the autoencoder, beside two baselines without one."""
    recipe, device = call.recipe, device_of(call.recipe.compute.evaluate)
    bucketing = Bucketing(recipe.strides.pixels, recipe.dataset.fps_max, recipe.seed)
    clips = ClipDataset(call.input("dataset"), call.workspace, bucketing)
    autoencoder = open_autoencoder(recipe, call.input("autoencoder")).to(device)
    originals = read_split(clips, recipe, "holdout", recipe.evaluation.loss_clips)
    if not originals:
        raise CallError("no held-out clip has the frames and pixels that the autoencoder is measured at")
    seen = read_split(clips, recipe, "train", None)
    if not seen:
        raise CallError("no training clip has the frames and pixels that the mean frame is taken at: add footage")
    means = mean_frames(seen, [clip.shape[1:3] for clip in originals])
    with torch.inference_mode():
        passed = [
            autoencoder.decode(autoencoder.encode(to_video([clip]).to(device)), len(clip)).cpu()
            for clip in tqdm(originals)
        ]
    rebuilt = [to_frames(video)[0] for video in passed]
    lpips, reason = lpips_of(call, originals, rebuilt)
    document = {
        "psnr": average([psnr(a, b) for a, b in zip(originals, rebuilt, strict=True)]),
        "ssim": average([ssim(a, b) for a, b in zip(originals, rebuilt, strict=True)]),
        "lpips": lpips,
        "lpips_reason": reason,
        "psnr_mean_frame": average([psnr(a, still(means[a.shape[1:3]], a)) for a in originals]),
        "psnr_own_mean_frame": average([psnr(a, still(a.mean(0), a)) for a in originals]),
        "num_clips": len(originals),
    }
    atomic_write(call.out / "reconstruction.json", json.dumps(document, indent=2))
    picture_of(originals, rebuilt, call.out / "reconstruction.png")
    metrics = {name: float(value) for name, value in document.items() if isinstance(value, int | float)}
    call.finish(metrics, {"lpips_reason": reason} if reason else {}, pictures=["reconstruction.png"])


def read_split(clips: ClipDataset, recipe: Recipe, split: str, most: int | None) -> list[Frames]:
    """Clips of a split at the last autoencoder stage's shape (or the sampling one), from their start."""
    stages = recipe.autoencoder.stages
    resolution, frames = (
        (stages[-1].resolution, stages[-1].frames)
        if stages
        else (
            recipe.sampling.resolution,
            recipe.sampling.frames,
        )
    )
    found: list[Frames] = []
    for clip in sorted(clips.of(split), key=lambda clip: clip.footage.clip_id):
        footage = clip.footage
        if clips.bucketing.holds(footage, resolution, frames) and (most is None or len(found) < most):
            found.append(clips.read(footage.clip_id, clips.bucketing.size(footage, resolution), frames))
    return found


def mean_frames(clips: Sequence[Frames], sizes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """Mean picture of all frames of all clips of each size (H, W): what is known without seeing the input.

    For a size that no clip has, the clips of every size are averaged, resized to it.
    """
    frames = [clip.mean(0) for clip in clips]
    means: dict[tuple[int, ...], np.ndarray] = {}
    for size in set(sizes):
        same = [frame for frame in frames if frame.shape[:2] == size]
        area = cv2.INTER_AREA
        means[size] = np.mean(same or [cv2.resize(f, size[::-1], interpolation=area) for f in frames], axis=0)
    return means


def still(frame: np.ndarray, like: Frames) -> np.ndarray:
    """One frame [H,W,3] repeated to the length of a clip."""
    return np.broadcast_to(frame, like.shape)


def lpips_of(call: Call, originals: Sequence[Frames], rebuilt: Sequence[Frames]) -> tuple[float | None, str]:
    """Mean LPIPS over frames and clips; None with the reason when the call was given no weights and none are cached.

    Raises LpipsError when the weights that the call was given are not there.
    """
    path = lpips_weights(call)
    if "lpips" not in call.inputs and not path.is_file():
        return None, f"no weights at cache/lpips/{path.name}"
    network = load_lpips(path)
    with torch.inference_mode():
        distances = [network(_pictures(a), _pictures(b)).mean() for a, b in zip(originals, rebuilt, strict=True)]
    return float(torch.stack(distances).mean()), ""


def picture_of(originals: Sequence[Frames], rebuilt: Sequence[Frames], path: Path) -> Path:
    """Some clips, evenly picked: the original above its reconstruction."""
    picked = np.unique(np.linspace(0, len(originals) - 1, SHEET_CLIPS).round().astype(int))
    strips = []
    for name, clips in (("original", originals), ("reconstruction", rebuilt)):
        strips.append(Strip(name, [spread(clips[i], 2) for i in picked]))
    return sheet(strips, path)


def average(values: Sequence[float]) -> float:
    """Mean of some numbers."""
    return float(np.mean(values))


def _pictures(clip: Frames) -> Tensor:
    return to_video([clip])[0].transpose(0, 1)


if __name__ == "__main__":
    sys.exit(main())
