"""Judging a checkpoint: the VBench task (`python -m evaluation.judge vbench`), preference report, whole report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation import dimensions, preference
from evaluation.gates import judge
from evaluation.reconstruction import WEIGHTS, reconstruction_metrics
from evaluation.report import Protocol, Report
from evaluation.report_page import markdown, page
from evaluation.vbench import VBenchResult, evaluate
from evaluation.votes import read_votes, votes_file
from infra.storage import atomic_write, sha256_of
from infra.workspace import Workspace
from ml.entry import RESULT, Call, parse

SHEET = "contact_sheet.png"
Found = tuple[dict[str, float], dict[str, str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one op from the command line."""
    vbench_report(parse(argv, ["vbench"], "Judge samples with VBench, in its own environment."))


def vbench_report(call: Call) -> None:
    """The step `vbench_report`: `vbench.json` with all 16 dimensions, real or absent with the reason."""
    samples = call.input("samples")
    table = pd.read_parquet(samples / "samples.parquet")
    prompts = {Path(path).name: str(prompt) for path, prompt in zip(table["path"], table["prompt"], strict=True)}
    cache = Workspace(call.workspace).cache / "vbench"
    result = evaluate(samples / "videos", call.recipe.evaluation.vbench_dimensions, call.out, cache, prompts)
    metrics = {f"vbench/{name}": score for name, score in result.scores.items()}
    facts = {"absent": result.absent, "versions": dict(result.versions), "notes": list(result.notes)}
    call.finish(metrics, facts, data=["vbench.json"])


def preference_report(call: Call) -> None:
    """The step `preference_report`: what people said so far about these samples, or that nobody has voted yet."""
    model = call.input("samples").name
    votes = read_votes(votes_file(call.workspace, call.recipe.id))
    against = preference.opponent(votes, model)
    metrics: dict[str, float] = {"preference/votes": 0.0}
    document: dict[str, Any] = {"status": "no votes yet", "model": model, "num_votes": 0, "axes": {}}
    if against is not None:
        found = preference.measure(votes, model, against, call.recipe.seed)
        document = {"status": "measured", **asdict(found)}
        metrics = {"preference/votes": float(found.num_votes)}
        metrics |= {f"preference/{axis}": result.win_probability for axis, result in found.axes.items()}
    atomic_write(call.out / "preference.json", json.dumps(document, indent=1))
    call.finish(metrics, {"status": document["status"]}, data=["preference.json"])


def write_report(call: Call) -> None:
    """The step `report`: `report.json`, `report.md` and `report.html` over everything that was measured."""
    vbench = VBenchResult.from_json(_read(call.input("vbench_report") / "vbench.json"))
    rebuilt = reconstruction_metrics(call.input("reconstruction_report"))
    parts = [_losses(call), rebuilt, _vbench(vbench), _preference(call)]
    report = Report(
        checkpoint=_digest(call.input("checkpoint") / "weights.safetensors"),
        protocol=_protocol(call, vbench.versions),
        metrics={name: value for metrics, _ in parts for name, value in metrics.items()},
        absent={name: reason for _, absent in parts for name, reason in absent.items()},
        per_video={f"vbench/{name}": dict(d.per_video) for name, d in vbench.dimensions.items() if d.per_video},
        notes=(*vbench.notes, *_votes_note(call)),
    )
    sheet = call.input("samples") / SHEET
    copied = atomic_write(call.out / SHEET, sheet.read_bytes()) if sheet.is_file() else None
    gate = judge(report, call.recipe.evaluation.gate).lines
    atomic_write(call.out / "report.json", report.as_json())
    atomic_write(call.out / "report.md", markdown(report, gate, copied))
    atomic_write(call.out / "report.html", page(report, gate, copied))
    facts = {"id": report.id, "absent": dict(report.absent), "protocol": asdict(report.protocol)}
    call.finish(dict(report.metrics), facts, [SHEET] if copied else [], data=["report.json"])


def _losses(call: Call) -> Found:
    found = _read(call.input("loss_report") / "losses.json")
    stages = {f"loss/stage/{name}": value for name, value in found["by_stage"].items()}
    named = {"loss/held_out": found["held_out"], "loss/untrained": found["untrained"], **stages}
    metrics = {name: float(value) for name, value in named.items() if value is not None}
    return metrics, {name: "the losses step did not measure it" for name in named if name not in metrics}


def _vbench(result: VBenchResult) -> Found:
    scores = {f"vbench/{name}": score for name, score in result.scores.items()}
    absent = {f"vbench/{name}": reason for name, reason in result.absent.items()}
    total = f"{len(absent)} of its 16 dimensions are absent, and a total of the others would not be VBench's"
    if absent:
        return scores, {**absent, "vbench/total": total}
    summed = dimensions.total(result.scores)
    return {**scores, **{f"vbench/{name}": value for name, value in asdict(summed).items()}}, {}


def _preference(call: Call) -> Found:
    found = _read(call.input("preference_report") / "preference.json")
    axes, status = found["axes"], found["status"]
    metrics = {f"preference/{axis}": float(result["win_probability"]) for axis, result in axes.items()}
    absent = {f"preference/{axis}": status for axis in preference.AXES if axis not in axes}
    if not found["num_votes"]:
        return metrics, {**absent, "preference/wins": status}
    return {**metrics, "preference/wins": float(found["wins"])}, absent


def _votes_note(call: Call) -> list[str]:
    """How far the votes carry: against which samples, how many, the interval of each axis, how far voters agree."""
    found = _read(call.input("preference_report") / "preference.json")
    if not found["num_votes"]:
        return []
    ends = [f"{axis} {r['interval'][0]:.2f} to {r['interval'][1]:.2f}" for axis, r in found["axes"].items()]
    alpha = "not measurable yet" if found["agreement"] is None else f"{found['agreement']:.2f}"
    voters = f"{found['num_votes']} votes of {found['num_voters']} voters"
    return [f"preferred to samples {found['against']}, {voters}: {', '.join(ends)}; Krippendorff's alpha {alpha}"]


def _protocol(call: Call, versions: Mapping[str, str]) -> Protocol:
    """Everything that was asked, and digests of everything that took part but is not the checkpoint."""
    wanted, sampling = call.recipe.evaluation, call.recipe.sampling
    prompts = _read(call.input("prompts") / RESULT)["facts"]
    latents = call.input("latents")
    return Protocol(
        recipe=call.recipe.id,
        prompt_set=prompts["set"],
        prompt_digest=prompts["digest"],
        seeds=wanted.seeds,
        resolution=sampling.resolution,
        aspect=sampling.aspect,
        frames=sampling.frames,
        fps=sampling.fps,
        sampling_steps=sampling.steps,
        guidance_text=sampling.guidance_text,
        guidance_image=sampling.guidance_image,
        oscillate=sampling.oscillate,
        sampling_digest=call.recipe.digest("sampling"),
        objective_digest=call.recipe.digest("objective"),
        loss_timesteps=wanted.loss_timesteps,
        loss_clips=wanted.loss_clips,
        held_out_digest=str(_read(latents / RESULT)["data_version"]),
        autoencoder_digest=_digest(call.input("autoencoder") / "weights.safetensors"),
        text_encoder_digest=str(_read(latents / "encoders.json")["text"]["digest"]),
        lpips_digest=_digest(call.input("lpips") / WEIGHTS),
        vbench_version=versions.get("vbench", "not run"),
        torch_version=version("torch"),
        device=call.recipe.compute.sample.accelerators.split(":")[0],
    )


def _digest(path: Path) -> str:
    return sha256_of(path)[:16]


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
