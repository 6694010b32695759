from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from infra.workspace import Workspace
from ml.curation import pictures
from ml.curation.filters import Drop
from ml.sections import Range


def load(path: Path) -> np.ndarray:
    """A picture as uint8 RGB [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def green(image: np.ndarray) -> int:
    """Pixels of the colour of kept clips."""
    return int((np.abs(image.astype(int) - (47, 127, 116)).max(axis=-1) < 12).sum())


def test_bars_are_as_long_as_their_numbers(tmp_path):
    pictures.funnel_plot([Drop("motion", "0.5 <= motion", 100, 50), Drop("duplicate", "", 50, 0)], tmp_path / "a.png")
    pictures.funnel_plot([Drop("motion", "0.5 <= motion", 100, 90), Drop("duplicate", "", 10, 0)], tmp_path / "b.png")
    many, few = (green(load(tmp_path / name)) for name in ("a.png", "b.png"))
    assert few / many == np.clip(few / many, 0.5, 0.68)  # (100 + 10 + 10) / (100 + 50 + 50), less the white numbers


def test_a_score_that_leaves_nothing_in_range_has_no_green_bar(tmp_path):
    table = pd.DataFrame({"status": "ok", "motion": np.linspace(1, 9, 50)})
    for name, limits in (("in.png", Range(max=20)), ("out.png", Range(max=0.5))):
        pictures.score_plot(table, ["motion"], {"motion": limits}, tmp_path / name)
    kept, gone = (green(load(tmp_path / name)) for name in ("in.png", "out.png"))
    assert kept > 1000
    assert gone == 0


def test_scores_without_clips_or_spread_over_decades_can_be_drawn(tmp_path):
    for values in ([], [3.0], np.geomspace(0.01, 1e5, 200)):
        table = pd.DataFrame({"status": "ok", "motion": np.asarray(values, dtype=float)})
        pictures.score_plot(table, ["motion"], {"motion": Range(min=1.0, max=50.0)}, tmp_path / "scores.png")
        assert load(tmp_path / "scores.png").shape[1] > 300


def test_a_contact_sheet_shows_the_middle_frames_and_survives_a_lost_file(tmp_path, encode):
    red = [np.full((90, 160, 3), (200, 20, 20), np.uint8)] * 12
    encode(tmp_path / "red.mp4", red)
    rows = {
        "clip_id": ["a" * 16, "b" * 16],
        "path": ["red.mp4", "gone.mp4"],
        "start_seconds": 0.0,
        "duration_seconds": 0.5,
    }
    pictures.contact_sheet(pd.DataFrame(rows), Workspace(tmp_path), tmp_path / "contact.png")
    sheet = load(tmp_path / "contact.png")
    x, y = pictures.GAP_PX + pictures.TILE_WIDTH_PX // 2, pictures.GAP_PX + pictures.TILE_HEIGHT_PX // 2
    assert sheet[y, x, 0] > 150
    assert sheet[y, x + pictures.TILE_WIDTH_PX + pictures.GAP_PX].max() < 60


def test_a_sheet_holds_at_most_24_clips_and_also_none(tmp_path, encode):
    encode(tmp_path / "a.mp4", [np.zeros((48, 64, 3), np.uint8)] * 3)
    rows = pd.DataFrame({"clip_id": [f"{i:016x}" for i in range(60)], "path": "a.mp4"})
    rows = rows.assign(start_seconds=0.0, duration_seconds=0.1)
    pictures.contact_sheet(rows, Workspace(tmp_path), tmp_path / "many.png")
    pictures.contact_sheet(rows.head(0), Workspace(tmp_path), tmp_path / "none.png")
    height = pictures.TILE_HEIGHT_PX + pictures.LABEL_PX
    assert len(load(tmp_path / "many.png")) == 4 * height + pictures.GAP_PX
    assert len(load(tmp_path / "none.png")) == height + pictures.GAP_PX
