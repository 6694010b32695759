"""Manifests: the schema holds, and a table that breaks it is named."""

from pathlib import Path

import pandas as pd
import pytest

from ml.manifest import LATENTS, SHOTS, ManifestError, stable_id


def shots(count: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "shot_id": [stable_id("v", i) for i in range(count)],
            "video_id": "v",
            "corpus": "sample",
            "shard": "film",
            "start_frame": range(count),
            "end_frame": range(1, count + 1),
            "start_seconds": [float(i) for i in range(count)],
            "end_seconds": [float(i + 1) for i in range(count)],
        }
    )


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    SHOTS.write(shots(), tmp_path)
    pd.testing.assert_frame_equal(SHOTS.read(tmp_path), SHOTS.conform(shots()))
    assert not list(tmp_path.glob("*.partial"))


def test_rows_of_several_folders_are_joined_and_further_columns_kept(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    SHOTS.write(shots(2).assign(note="x"), first)
    SHOTS.write(shots(4).iloc[2:].assign(note="y"), second)
    both = SHOTS.read(first, second)
    assert list(both["note"]) == ["x", "x", "y", "y"]


def test_no_folders_is_an_empty_table() -> None:
    assert SHOTS.read().empty


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (shots().drop(columns="end_frame"), "missing column.*end_frame"),
        (shots().assign(video_id=[None, "v", "v"]), "column video_id has no value in row 0"),
        (pd.concat([shots(1), shots(1)]), "stands there more than once"),
    ],
)
def test_what_breaks_the_schema_is_named(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        SHOTS.conform(frame)


def test_an_unfinished_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no shots\.parquet"):
        SHOTS.read(tmp_path)


def test_ids_depend_on_every_part_and_on_nothing_else() -> None:
    assert stable_id("a", 1) == stable_id("a", "1")
    assert stable_id("a", "bc") != stable_id("ab", "c")
    assert len(stable_id("a")) == 16


def test_latents_say_where_they_lie_and_how_fast_their_clips_run() -> None:
    """1.1 to 1.3 tell the network the frame rate of each clip, 1.x its pixels too."""
    kinds = {column.name: column.kind for column in LATENTS.columns}
    assert LATENTS.key == "key"
    assert {
        "resolution": "str",
        "height": "int",
        "width": "int",
        "frames": "int",
        "fps": "float",
    }.items() <= kinds.items()
    row = {"key": "c/48x80/48x80/5", "clip_id": "c", "split": "train", "tiers": "base", "resolution": "48x80"}
    rest = {"height": 48, "width": 80, "frames": 5, "shard": "latents-00000.safetensors", "crc32": 7}
    with pytest.raises(ManifestError, match=r"missing column.*fps"):
        LATENTS.conform(pd.DataFrame([{**row, **rest}]))
    assert LATENTS.conform(pd.DataFrame([{**row, **rest, "fps": 12}]))["fps"].dtype == "float64"
