"""Great Expectations really runs here: good tables pass, each planted fault is found with its severity and ids."""

import json
import re

import pandas as pd
import pytest

from evaluation.expectations import validate
from ml.recipe import Recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("v2_0")


def _examples(n: int = 40) -> pd.DataFrame:
    ids = [f"{i:016x}" for i in range(n)]
    frame = pd.DataFrame({"clip_id": ids, "video_id": [f"{i // 4:016x}" for i in range(n)]})
    frame["sha256"] = [f"{i:064x}" for i in range(n)]
    frame["shot_id"], frame["start_seconds"] = ids, [float(i) for i in range(n)]
    frame["split"] = ["holdout" if i // 4 >= 8 else "train" for i in range(n)]
    fixed = {"path": "clips/a.mp4", "caption": "a rabbit in a meadow", "tiers": "base high finest", "width": 320}
    return frame.assign(**fixed, height=240, fps=12.0, num_frames=30, licence="CC0-1.0")


def _videos() -> pd.DataFrame:
    ids = [f"{i:016x}" for i in range(4)]
    frame = pd.DataFrame({"video_id": ids, "sha256": [f"{i:064x}" for i in range(4)]})
    fixed = {"path": "a.mp4", "source": "package", "licence": "CC0-1.0", "text": "", "corpus": "c", "shard": "s"}
    facts = {"width": 320, "height": 240, "fps": 25.0, "num_frames": 100, "duration_seconds": 4.0, "codec": "h264"}
    return frame.assign(**fixed, **facts, size_bytes=1000, status="ok", reason="")


def _found(validation) -> dict[str, tuple[str, tuple[str, ...], int]]:
    return {f.column: (f.severity, f.ids, f.count) for f in validation.failures}


def test_a_good_table_passes_and_leaves_a_page(recipe, tmp_path):
    validation = validate("examples", _examples(), recipe, tmp_path)
    assert validation.failures == ()
    assert (validation.success, validation.max_severity, validation.blocks) == (True, None, False)
    assert "everything holds" in validation.page.read_text(encoding="utf-8")


def test_planted_faults_are_found_with_severity_and_ids(recipe, tmp_path):
    bad = _examples()
    bad.loc[39, "split"] = "train"
    bad.loc[3, "sha256"] = "not a digest"
    bad.loc[4, "licence"] = "proprietary"
    bad["tiers"] = "base high"
    validation = validate("examples", bad, recipe, tmp_path)
    leaked = tuple(f"{i:016x}" for i in range(36, 40))
    assert _found(validation) == {
        "splits_of_short_video": ("critical", leaked, 4),
        "sha256": ("critical", (f"{3:016x}",), 1),
        "licence": ("critical", (f"{4:016x}",), 1),
        "in_finest": ("warning", (), 0),
    }
    assert validation.blocks
    assert not validation.success


def test_only_the_first_twenty_ids_are_listed_and_all_are_counted(recipe, tmp_path):
    validation = validate("examples", _examples().assign(caption=""), recipe, tmp_path)
    severity, ids, count = _found(validation)["caption"]
    assert (severity, len(ids), count) == ("critical", 20, 40)


def test_a_warning_alone_does_not_block(recipe, tmp_path):
    validation = validate("examples", _examples().assign(tiers="base"), recipe, tmp_path)
    assert (validation.success, validation.max_severity, validation.blocks) == (False, "warning", False)


def test_missing_columns_and_empty_tables_fail_instead_of_raising(recipe, tmp_path):
    missing = validate("examples", _examples().drop(columns=["licence"]), recipe, tmp_path)
    assert missing.blocks
    assert any("licence" in f.observed for f in missing.failures)
    assert validate("examples", _examples().iloc[:0], recipe, tmp_path).blocks


def test_rejected_rows_are_held_to_less(recipe, tmp_path):
    videos = _videos()
    lost = {"status": "rejected", "reason": "unreadable", "sha256": "", "width": 0, "height": 0, "fps": 0.0}
    videos.loc[3, list(lost)] = list(lost.values())
    videos.loc[3, ["num_frames", "size_bytes", "duration_seconds"]] = 0
    assert validate("videos", videos, None, tmp_path).failures == ()
    videos.loc[3, "reason"] = ""
    assert _found(validate("videos", videos, recipe, tmp_path)) == {"reason": ("warning", (f"{3:016x}",), 1)}


def test_the_page_loads_nothing_and_escapes_what_the_table_says(recipe, tmp_path):
    validation = validate("examples", _examples().assign(licence="<script>alert(1)</script>"), recipe, tmp_path)
    page = validation.page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|<script", page)
    assert "&lt;script&gt;" in page
    results = json.loads(validation.page.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(results) == validation.num_expectations
    json.dumps([failure.as_dict() for failure in validation.failures])
