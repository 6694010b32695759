"""The judging steps, end to end over hand-made folders of what the steps before leave behind."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from evaluation.dimensions import DIMENSIONS
from evaluation.judge import preference_report, vbench_report, write_report
from evaluation.preference import AXES
from evaluation.report import Report, ReportError, compare
from evaluation.votes import Vote, append_votes, votes_file
from infra.tracking import RunLog
from ml.entry import Call
from ml.recipe import Recipe

PARTS = ("loss_report", "reconstruction_report", "vbench_report", "preference_report", "samples", "latents", "prompts")
LOSSES = {"held_out": 0.7, "untrained": 1.4, "by_stage": {"stage1": 0.9, "stage3": 0.7}}


def _vbench() -> dict:
    absent = {"status": "absent", "score": None, "per_video": {}, "reason": "no weights", "seconds": 0.0}
    dimensions = {name: {"name": name, **absent} for name in DIMENSIONS}
    real = {"status": "real", "score": 0.9, "per_video": {"0-0.mp4": 0.88, "1-0.mp4": 0.92}, "reason": ""}
    dimensions["temporal_flickering"] |= real
    return {"dimensions": dimensions, "versions": {"vbench": "0.1.5"}, "num_videos": 2, "notes": ["ours"]}


def _json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def folders(tmp_path) -> dict[str, tuple[Path, ...]]:
    root = tmp_path / "steps"
    _json(root / "loss_report" / "losses.json", LOSSES)
    _json(root / "reconstruction_report" / "reconstruction.json", {"psnr": 24.0, "psnr_mean_frame": 16.0})
    _json(root / "vbench_report" / "vbench.json", _vbench())
    _json(root / "latents" / "result.json", {"data_version": "d" * 16})
    _json(root / "latents" / "encoders.json", {"text": {"kind": "minilm", "digest": "e" * 16}})
    _json(root / "prompts" / "result.json", {"facts": {"set": "walk", "digest": "f" * 16}})
    samples = root / "samples" / "a1"
    samples.mkdir(parents=True)
    (samples / "contact_sheet.png").write_bytes(b"\x89PNG")
    pd.DataFrame({"prompt": ["a dog"], "path": ["videos/0-0.mp4"]}).to_parquet(samples / "samples.parquet")
    for name, file in (
        ("checkpoint", "weights.safetensors"),
        ("autoencoder", "weights.safetensors"),
        ("lpips", "alex.safetensors"),
    ):
        _json(root / name / file, name)
    plain = {name: (root / name,) for name in (*PARTS, "checkpoint", "autoencoder", "lpips")}
    return {**plain, "samples": (samples,)}


def _call(op: str, tmp_path: Path, folders: dict[str, tuple[Path, ...]]) -> Call:
    out = tmp_path / "steps" / op
    out.mkdir(parents=True, exist_ok=True)
    return Call(op, Recipe.load("v2_0"), tmp_path, out, folders, {}, RunLog(None, None))


def test_nobody_voted_yet_is_said_and_the_report_is_whole(tmp_path, folders):
    preference_report(_call("preference_report", tmp_path, folders))
    call = _call("report", tmp_path, folders)
    write_report(call)
    report = Report.from_json((call.out / "report.json").read_text(encoding="utf-8"))
    assert report.metrics["loss/held_out"] == 0.7
    assert report.metrics["loss/stage/stage1"] == 0.9
    assert report.metrics["reconstruction/psnr"] == 24.0
    assert report.metrics["vbench/temporal_flickering"] == 0.9
    assert report.absent["preference/motion"] == report.absent["preference/wins"] == "no votes yet"
    assert report.absent["vbench/scene"] == "no weights"
    assert report.absent["vbench/total"].startswith("15 of its 16")
    assert "lpips" not in "".join(report.metrics)
    assert report.protocol.text_encoder_digest == "e" * 16
    assert report.intervals()["vbench/temporal_flickering"] == pytest.approx((0.88, 0.92))
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert (result["data"], result["pictures"]) == (["report.json"], ["contact_sheet.png"])
    assert "pass  loss/held_out" in (call.out / "report.md").read_text(encoding="utf-8")
    assert report.id in (call.out / "report.html").read_text(encoding="utf-8")


def test_votes_become_metrics(tmp_path, folders):
    axes = [(axis, choice) for axis in AXES for choice in ("left", "left", "right")]
    votes = [Vote(f"p{i}", "a1", "old", axis, choice, "me", 1.0, 1.0) for i, (axis, choice) in enumerate(axes)]
    append_votes(votes_file(tmp_path, "v2_0-tiny"), votes)
    preference_report(_call("preference_report", tmp_path, folders))
    call = _call("report", tmp_path, folders)
    write_report(call)
    report = Report.from_json((call.out / "report.json").read_text(encoding="utf-8"))
    assert report.metrics["preference/wins"] == 1.0
    assert report.metrics["preference/motion"] == pytest.approx(2.1 / 3.2)
    assert "9 votes of 1 voters" in report.notes[-1]
    assert "alpha not measurable yet" in report.notes[-1]


def test_another_checkpoint_gives_another_report(tmp_path, folders):
    preference_report(_call("preference_report", tmp_path, folders))
    call = _call("report", tmp_path, folders)
    write_report(call)
    before = (call.out / "report.json").read_text(encoding="utf-8")
    _json(folders["checkpoint"][0] / "weights.safetensors", "trained further")
    write_report(call)
    after = Report.from_json((call.out / "report.json").read_text(encoding="utf-8"))
    assert after.id != Report.from_json(before).id
    assert after.protocol == Report.from_json(before).protocol


@pytest.mark.parametrize(
    ("section", "change", "field"),
    [
        ("sampling", {"solver": "dpm_solver", "guided_channels": None}, "sampling_digest"),
        ("sampling", {"negative_prompt": "blurry"}, "sampling_digest"),
        ("sampling", {"score": {"style": "v1_2", "aesthetic": 6.5}}, "sampling_digest"),
        ("objective", {"beta_end": 0.03}, "objective_digest"),
    ],
)
def test_reports_of_another_way_to_sample_do_not_compare(tmp_path, folders, section, change, field):
    """Solver, negative prompt, score words and noise schedule move a metric, though no field of its own names them."""
    document = Recipe.load("v1_0").model_dump(mode="json")
    changed = {**document, section: {**document[section], **change}}
    preference_report(_call("preference_report", tmp_path, folders))
    reports = []
    for recipe in (Recipe.validate_document(part, "r") for part in (document, changed)):
        call = replace(_call("report", tmp_path, folders), given_recipe=recipe)
        write_report(call)
        reports.append(Report.from_json((call.out / "report.json").read_text(encoding="utf-8")))
    with pytest.raises(ReportError, match=rf"do not compare: {field} \([0-9a-f]{{16}} against [0-9a-f]{{16}}\)$"):
        compare(*reports)


@pytest.mark.slow
def test_a_total_stands_only_beside_all_sixteen_dimensions(tmp_path, folders):
    document = _vbench()
    for name in DIMENSIONS:
        document["dimensions"][name] |= {"status": "real", "score": DIMENSIONS[name].maximum}
    _json(folders["vbench_report"][0] / "vbench.json", document)
    preference_report(_call("preference_report", tmp_path, folders))
    call = _call("report", tmp_path, folders)
    write_report(call)
    report = Report.from_json((call.out / "report.json").read_text(encoding="utf-8"))
    assert report.metrics["vbench/total"] == pytest.approx(1.0)
    assert report.metrics["vbench/quality"] == report.metrics["vbench/semantic"] == pytest.approx(1.0)
    assert "vbench/total" not in report.absent


def test_the_vbench_step_scores_samples(tmp_path, folders):
    """Slow: runs VBench in its own environment."""
    import av
    import numpy as np

    videos = folders["samples"][0] / "videos"
    videos.mkdir()
    with av.open(str(videos / "0-0.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(5):
            picture = np.full((64, 64, 3), 90, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    call = _call("vbench_report", tmp_path, folders)
    vbench_report(call)
    result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
    assert result["metrics"]["vbench/temporal_flickering"] == pytest.approx(1.0, abs=1e-3)
    assert len(result["facts"]["absent"]) == 15
