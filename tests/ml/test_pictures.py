from pathlib import Path

import numpy as np
from PIL import Image

from ml.pictures import Strip, curves, sheet, spread


def flat(value: int, frames: int = 1) -> np.ndarray:
    return np.full((frames, 16, 24, 3), value, np.uint8)


def test_a_sheet_holds_every_frame_in_its_row(tmp_path: Path) -> None:
    strips = [Strip("dark to light", [flat(40), flat(90, 2)]), Strip("bright", [flat(200, 3)])]
    image = np.asarray(Image.open(sheet(strips, tmp_path / "sheet.png", height_px=32, title="two rows")))
    for value, count in ((40, 1), (90, 2), (200, 3)):
        assert (image == value).all(-1).sum() >= count * 32 * 48 * 0.98
    rows = {value: np.nonzero((image == value).all(-1).sum(1) > 40)[0].mean() for value in (40, 90, 200)}
    assert rows[40] == rows[90] < rows[200]


def test_a_long_label_is_wrapped_and_the_frames_move_down(tmp_path: Path) -> None:
    texts = ("a", "word " * 30)
    pictures = [sheet([Strip(text, [flat(9)])], tmp_path / f"{len(text)}.png", 32) for text in texts]
    short, long = (np.asarray(Image.open(path).convert("RGB")).shape for path in pictures)
    assert long[0] > short[0]
    assert long[1] == short[1]


def test_frames_are_spread_from_first_to_last() -> None:
    clip = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert spread(clip, 3)[:, 0, 0, 0].tolist() == [0, 4, 8]
    assert len(spread(clip[:2], 4)) == 2
    assert len(spread(clip[:1], 4)) == 1


def test_curves_are_drawn(tmp_path: Path) -> None:
    lines = {"untrained": [2.0, 2.0], "stage1": [1.5, 0.5]}
    path = curves(lines, [0.25, 0.75], ("held-out loss", "time", "loss"), tmp_path / "losses.png")
    assert len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0)) > 50
