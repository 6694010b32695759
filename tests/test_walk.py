"""The whole house on synthetic footage: every step real, every number small. One workspace, walked once a module."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image

from assets.costs import recipe_rows
from assets.steps import Walk
from infra.registry import Registry
from infra.runs import Status
from infra.settings import Settings
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.recipe import Recipe
from orchestration.resources import walk_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.xdist_group("walk")]


def micro() -> dict[str, Any]:
    """The tiny recipe with wide thresholds and a handful of steps, as a document of its own."""
    document = Recipe.load("v2_0", "tiny").model_dump(mode="json")
    document.pop("profile")
    document["name"] = "micro"
    document["curation"]["keep"] = {
        "thresholds": {name: {"min": None, "max": None} for name in document["curation"]["scores"]},
        "dedup_bits": 0,
    }
    for tier in document["dataset"]["tiers"]:
        tier["thresholds"] = {}
    document["dataset"]["holdout_fraction"] = 0.3
    document["autoencoder"]["stages"][0].update(steps=6, checkpoint_every=3, resolution="32px")
    for stage in document["stages"]:
        stage.update(steps=6, checkpoint_every=2, buckets={"32px": {1: cell(4), 5: cell(4)}, "64px": {5: cell(2)}})
    document["sampling"].update(steps=3, frames=5, resolution="64px")
    document["evaluation"].update(num_prompts=1, seeds=[0], loss_clips=4, loss_timesteps=2)
    return {**document, "profiles": {"tiny": {}}}


def cell(batch: int) -> dict[str, float]:
    return {"keep": 1.0, "batch": batch}


class House:
    """A working directory with its own recipes, workspace and Dagster home, spoken to through the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text("telemetry: {enabled: false}\n", encoding="utf-8")
        (folder / "recipes").mkdir()
        self.workspace = Workspace(folder / "workspace")
        self.settings = Settings(workspace=self.workspace.root, recipes="micro")
        self.write(micro())

    @property
    def recipe(self) -> Recipe:
        return Recipe.load("micro", "tiny", (self.folder / "recipes",))

    @property
    def walk(self) -> Walk:
        return walk_of([self.recipe], self.settings)

    @property
    def rows(self) -> pd.DataFrame:
        return recipe_rows(Tracker(self.settings.tracking_uri), self.recipe)

    def write(self, document: dict[str, Any]) -> None:
        (self.folder / "recipes" / "micro.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(self.home),
            "OPENSORA_WORKSPACE": str(self.workspace.root),
            "COLUMNS": "200",
        }
        command = [sys.executable, "-m", "orchestration.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            command, cwd=self.folder, env={**environment, "PYTHONPATH": str(ROOT)}, text=True, **pipes
        )

    def say(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == code, output
        return output

    def states(self) -> dict[str, str]:
        walk = self.walk
        return {
            "/".join((step.name, partition)): walk.state(step, partition)
            for step in walk.steps.values()
            for partition in (walk.partitions(step) if step.partitioned else [""])
        }

    def result(self, name: str) -> dict[str, Any]:
        made = self.walk.current(self.walk.step(("micro", name)))
        assert made, f"{name} was not made"
        return dict(made.result)

    def folder_of(self, name: str) -> Path:
        made = self.walk.current(self.walk.step(("micro", name)))
        assert made, f"{name} was not made"
        return made.folder


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> House:
    """Footage added, curated and walked: what most tests below look at."""
    house = House(tmp_path_factory.mktemp("house"))
    footage = house.folder / "footage"
    footage.mkdir()
    for number in range(5):
        make_video(footage / f"take{number}.mp4", frames=96, size=(96, 160), fps=24, cuts=(48,), seed=number)
    (footage / "broken.mp4").write_bytes(b"not a video at all")
    house.say("corpus", "add", "footage", "--name", "sample", "--licence", "CC0-1.0")
    house.say("run", "micro", "--job", "curate")
    house.say("run", "micro", "--job", "walk")
    return house


def test_every_step_of_the_walk_is_there_and_up_to_date(house: House) -> None:
    assert {state for name, state in house.states().items() if not name.startswith("cost_report")} == {"up to date"}
    for name in ("dit_stage1", "dit_stage2", "dit_stage3", "vae_stage1"):
        assert (house.folder_of(name) / "weights.safetensors").is_file()


def test_a_broken_file_became_a_rejected_row_with_its_reason(house: House) -> None:
    walk = house.walk
    step = walk.step(("corpus", "sample"))
    (partition,) = walk.partitions(step)
    made = walk.current(step, partition)
    assert made
    videos = pd.read_parquet(made.folder / "videos.parquet")
    (broken,) = videos[videos["status"] == "rejected"].to_dict("records")
    assert broken["path"].endswith("broken.mp4")
    assert broken["reason"]
    assert (videos["status"] == "ok").sum() == 5


def test_the_report_names_its_protocol_and_invents_nothing(house: House) -> None:
    report = json.loads((house.folder_of("report") / "report.json").read_text(encoding="utf-8"))
    assert 0.5 < report["metrics"]["vbench/temporal_flickering"] <= 1
    assert {"loss/held_out", "loss/untrained", "reconstruction/psnr", "reconstruction/lpips"} <= set(report["metrics"])
    assert len([name for name in report["absent"] if name.startswith("vbench/")]) >= 15
    assert all(report["absent"].values()), "every absent metric has its reason"
    assert report["protocol"]["seeds"] == [0]


def test_the_release_is_registered_with_its_provenance(house: House) -> None:
    registry = Registry(house.settings.tracking_uri)
    version = registry.by_alias("opensora-micro-tiny", "candidate")
    assert version
    assert version.sha256 == house.result("release")["facts"]["weights_sha256"]
    run = Tracker(house.settings.tracking_uri).get(version.run_id)
    assert run.tags["step"].endswith("dit_stage3")


def test_every_run_is_closed_and_billed(house: House) -> None:
    rows = house.rows
    assert set(rows["status"]) == {Status.FINISHED}
    assert (rows["cost_usd"] > 0).all()
    steps = {name.split("/")[1] for name in rows["step"]}
    assert {"shots", "clips", "scores", "curated", "captions", "dataset_version", "latents", "samples"} <= steps
    bill = pd.read_csv(house.folder_of("cost_report") / "bill.csv")
    assert bill["cost_usd"].sum() == pytest.approx(house.result("cost_report")["metrics"]["all_in_usd"])


def test_a_second_walk_recomputes_nothing(house: House) -> None:
    before = len(house.rows)
    output = house.say("run", "micro", "--job", "walk")
    assert "up to date" in output
    assert " + " not in output
    assert len(house.rows) == before


def test_clips_are_made_on_request_from_text_and_from_a_picture(house: House) -> None:
    picture, film = house.folder / "first.png", house.folder / "footage" / "take0.mp4"
    Image.new("RGB", (160, 96), (200, 40, 40)).save(picture)
    plain = Path(house.say("sample", "micro", "--prompt", "waves", "--seed", "5").strip().splitlines()[-1])
    given = ["--ref", str(picture), "--set", "condition=i2v_head"]
    led = Path(house.say("sample", "micro", "--prompt", "waves", "--seed", "5", *given).strip().splitlines()[-1])
    asked = [row.purpose for row in house.rows.itertuples() if row.step.endswith("/generated")]
    assert asked == ["eval", "eval"]
    clips = [(folder / "videos" / "0-5.mp4").read_bytes() for folder in (plain, led)]
    assert clips[0] != clips[1]
    assert "t2v" in house.say("sample", "micro", "--prompt", "waves", "--ref", str(picture), code=1)
    given[1] = str(film)
    assert "cut the video" in house.say("sample", "micro", "--prompt", "waves", *given, code=1)


def test_the_dataset_comes_back_byte_for_byte(house: House) -> None:
    listed = house.say("dataset", "list")
    revision = listed.split()[0]
    house.say("dataset", "checkout", revision, "restored")
    restored = (house.folder / "restored" / "examples.parquet").read_bytes()
    assert restored == (house.folder_of("dataset_version") / "examples.parquet").read_bytes()


def test_zero_clips_left_says_which_threshold_to_relax(house: House) -> None:
    document = micro()
    document["curation"]["keep"]["thresholds"]["brightness"] = {"min": 254.9}
    house.write(document)
    try:
        output = house.say("run", "micro", "--job", "walk", "--select", "curated", code=1)
        assert "brightness" in output
    finally:
        house.write(micro())


def test_a_killed_stage_resumes_and_the_lost_attempt_is_on_the_bill(house: House) -> None:
    document = micro()
    document["stages"][0].update(steps=400, checkpoint_every=10)
    house.write(document)
    kept = house.folder_of("latents")
    process = house.start("run", "micro", "--job", "walk", "--select", "dit_stage1")
    out = wait_for_checkpoint(house)
    for victim in (*task_processes(out), process.pid):
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "result.json").exists()
    reached = max(int(path.name.split("-")[1]) for path in saved(out, "checkpoints"))
    house.say("run", "micro", "--job", "walk", "--select", "dit_stage1")
    assert house.folder_of("dit_stage1") == out, "the same command must go on in the same folder"
    assert house.folder_of("latents") == kept
    steps = pd.read_csv(out / "loss.csv")["step"]
    assert list(steps) == list(range(1, 401)), "every step is logged once"
    log = (out / "task.log").read_text(encoding="utf-8")
    assert f"resumed at step {reached} of 400" in log, "the second attempt goes on where the first one was"
    attempts = house.rows[house.rows["step"].str.endswith("dit_stage1")].tail(2)
    assert list(attempts["purpose"]) == ["failed", "headline"]
    assert (attempts["cost_usd"] > 0).all()
    assert reached > 0


def wait_for_checkpoint(house: House) -> Path:
    """The output folder of the running stage, once it holds a checkpoint."""
    step = house.walk.step(("micro", "dit_stage1"))
    parent = house.workspace.root / "steps" / step.path()
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for found in saved(parent, "*/checkpoints"):
            if not (found.parents[1] / "result.json").exists():
                return found.parents[1]
        time.sleep(0.05)
    raise AssertionError("no checkpoint was written in four minutes")


def saved(folder: Path, below: str) -> list[Path]:
    """Finished checkpoints: one that is still being written has another name."""
    return [path for path in folder.glob(f"{below}/step-*") if path.name.removeprefix("step-").isdigit()]


def task_processes(out: Path) -> list[int]:
    """Every process that works on a step: the task and whatever supervises it."""
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]
