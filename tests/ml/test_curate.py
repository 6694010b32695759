"""Curation end to end, by the command line that the launcher uses, on two shards of footage made here."""

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import yaml

from infra.workspace import Workspace
from ml import curate, manifest
from ml.entry import CallError
from ml.recipe import Recipe

TINTS = np.array([(0, 0, 0), (110, 0, 0), (0, 110, 0), (0, 0, 110), (110, 110, 0), (0, 110, 110)], np.uint8)


def draw(path: Path, scenes: list[tuple[int, int, float]], fps: int = 12) -> None:
    """A video of scenes (seed, frames, pixels per frame): a window over a random texture in a tint of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.options = {"crf": "16", "preset": "ultrafast", "threads": "1"}
        for seed, frames, speed in scenes:
            noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
            picture = cv2.resize(noise // 2 + TINTS[seed], (640, 480), interpolation=cv2.INTER_CUBIC)
            for index in range(frames):
                left = round(speed * index)
                window = np.ascontiguousarray(picture[100:220, left : left + 160])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Shard one: moving, still and short scenes; shard two: the first scene again, and a file that is no video."""
    space = Workspace(tmp_path_factory.mktemp("workspace"))
    files = space.corpus("own") / "files"
    draw(files / "a.mp4", [(1, 24, 2.0), (2, 24, 0.0), (3, 12, 1.0), (4, 30, 1.0)])
    draw(files / "b.mp4", [(1, 24, 2.0), (5, 24, 1.5)])
    (files / "c.mp4").write_text("no video " * 99)
    for shard, names in (("one", ["a"]), ("two", ["b", "c"])):
        lines = [f"corpora/own/files/{name}.mp4,made here,CC0-1.0,Noise that slides." for name in names]
        path = space.shard_list("own", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["path,source,licence,text", *lines]) + "\n", encoding="utf-8")
    return space


def write_recipe(space: Workspace, thresholds: dict[str, dict[str, float]]) -> Path:
    """The tiny recipe, with these thresholds."""
    document = yaml.safe_load(Recipe.load("v2_0", "tiny").dump())
    document["curation"]["keep"] = {"thresholds": thresholds, "dedup_bits": 4}
    document["dataset"]["tiers"] = [{**tier, "thresholds": {}} for tier in document["dataset"]["tiers"]]
    path = space.root / "recipe.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def run(space: Workspace, op: str, out: str, *rest: str) -> dict:
    """Run one op into steps/<out> and return its result."""
    folder = space.root / "steps" / out
    recipe = str(space.root / "recipe.yaml")
    curate.main([op, "--workspace", str(space.root), "--out", str(folder), "--recipe", recipe, *rest])
    return json.loads((folder / "result.json").read_text())


def given(space: Workspace, name: str, *steps: str) -> list[str]:
    """Arguments that name step folders as inputs."""
    return [part for step in steps for part in ("--input", f"{name}={space.root / 'steps' / step}")]


@pytest.fixture(scope="module")
def results(space: Workspace) -> dict[str, dict]:
    """Every op's result, run once in order."""
    write_recipe(space, {"motion": {"min": 5.0}, "text_area": {"max": 0.05}})
    found = {}
    for shard in ("one", "two"):
        options = ["--option", "corpus=own", "--option", f"shard={shard}"]
        found[f"probe/{shard}"] = run(space, "probe", f"probe/{shard}", *options)
        videos = given(space, "videos", f"probe/{shard}")
        found[f"shots/{shard}"] = run(space, "shots", f"shots/{shard}", *videos)
        shots = given(space, "shots", f"shots/{shard}")
        found[f"clips/{shard}"] = run(space, "clips", f"clips/{shard}", *videos, *shots)
        found[f"scores/{shard}"] = run(space, "scores", f"scores/{shard}", *given(space, "clips", f"clips/{shard}"))
    both = given(space, "clips", "clips/one", "clips/two") + given(space, "scores", "scores/one", "scores/two")
    found["curated"] = run(space, "filter", "curated", *both)
    found["captions"] = run(space, "captions", "captions", *given(space, "curated", "curated"))
    return found


def test_every_op_counts_what_went_in_and_what_was_refused(results):
    def numbers(step: str, *names: str) -> tuple[float, ...]:
        return tuple(results[step]["metrics"][name] for name in names)

    assert numbers("probe/one", "videos_ok", "videos_rejected") == (1, 0)
    assert numbers("probe/two", "videos_ok", "videos_rejected") == (1, 1)
    assert "not a readable video" in results["probe/two"]["facts"]["rejected"]["corpora/own/files/c.mp4"]
    assert numbers("shots/one", "shots") == (4,)
    assert numbers("clips/one", "clips_cut", "clips_rejected") == (3, 1)
    assert numbers("curated", "clips_in")[0] == sum(
        numbers(f"clips/{shard}", name)[0] for shard in ("one", "two") for name in ("clips_cut", "clips_rejected")
    )


def test_the_funnel_adds_up_and_drops_the_still_and_the_repeated_scene(space, results):
    metrics = results["curated"]["metrics"]
    dropped = sum(value for key, value in metrics.items() if key.startswith("dropped_"))
    assert metrics["clips_in"] == dropped + metrics["clips_kept"]
    assert metrics["dropped_motion"] == 1
    assert metrics["dropped_duplicate"] == 1
    table = manifest.CURATED.read(space.root / "steps" / "curated")
    assert (table.reason != "").equals(~table.keep)
    funnel = json.loads((space.root / "steps" / "curated" / "funnel.json").read_text())
    assert funnel["funnel"][-1]["after"] == metrics["clips_kept"]


def test_paths_in_tables_are_relative_to_the_workspace_and_lead_to_files(space, results):
    table = manifest.CURATED.read(space.root / "steps" / "curated")
    kept = table[table.keep]
    assert kept.path.str.startswith("steps/clips/").all()
    assert all(space.resolve(path).is_file() for path in kept.path)


def test_every_kept_clip_has_a_caption_of_its_own_revision(space, results):
    table = manifest.CAPTIONS.read(space.root / "steps" / "captions")
    assert len(table) == results["curated"]["metrics"]["clips_kept"] == results["captions"]["metrics"]["captions"]
    assert table.caption.str.startswith("Noise that slides. A ").all()
    assert set(table.revision) == {"measured-1"}


def test_pictures_are_shown_and_are_no_data(space, results):
    for step, result in results.items():
        for picture in result["pictures"]:
            assert (space.root / "steps" / step / picture).read_bytes().startswith(b"\x89PNG")
            assert picture not in result["data"]
    assert results["curated"]["data"] == ["curated.parquet"]


def test_a_second_run_gives_the_same_data_version(space, results):
    assert run(space, "filter", "again", *_inputs(space))["data_version"] == results["curated"]["data_version"]
    videos, shots = given(space, "videos", "probe/one"), given(space, "shots", "shots/one")
    assert run(space, "shots", "shots_again", *videos)["data_version"] == results["shots/one"]["data_version"]
    assert run(space, "clips", "clips/one", *videos, *shots)["data_version"] == results["clips/one"]["data_version"]


def test_thresholds_that_leave_nothing_stop_with_advice(space, results):
    write_recipe(space, {"motion": {"min": 1e6}})
    with pytest.raises(ValueError, match=r"curation\.keep\.thresholds\.motion\.min=1e\+06 alone drops"):
        run(space, "filter", "nothing", *_inputs(space))
    assert not (space.root / "steps" / "nothing" / "result.json").exists()


def test_a_shard_without_a_sound_video_walks_on_with_empty_tables(space):
    write_recipe(space, {"motion": {"min": 5.0}})
    path = space.shard_list("own", "three")
    path.write_text("path,source,licence,text\ncorpora/own/files/c.mp4,here,CC0-1.0,\n", encoding="utf-8")
    run(space, "probe", "e/probe", "--option", "corpus=own", "--option", "shard=three")
    run(space, "shots", "e/shots", *given(space, "videos", "e/probe"))
    run(space, "clips", "e/clips", *given(space, "videos", "e/probe"), *given(space, "shots", "e/shots"))
    assert run(space, "scores", "e/scores", *given(space, "clips", "e/clips"))["metrics"]["clips_scored"] == 0


def test_an_op_without_its_input_says_which(space):
    write_recipe(space, {"motion": {"min": 5.0}})
    with pytest.raises(CallError, match="shots needs exactly one --input videos=FOLDER"):
        run(space, "shots", "lost")


def _inputs(space: Workspace) -> list[str]:
    return given(space, "clips", "clips/one", "clips/two") + given(space, "scores", "scores/one", "scores/two")
