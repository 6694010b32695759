import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from infra.workspace import Workspace
from ml.curation import clips, footage, probe, shots
from ml.manifest import VIDEOS
from ml.sections import Clips, Shots

SETTINGS = Clips(min_seconds=1.0, max_seconds=2.0, fps=12, short_side_px=96, crf=20)
SHOTS = Shots(detector="adaptive", threshold=3.0, min_seconds=0.5)
LICENCES = ("CC0-1.0",)
CUT = """
import sys
from pathlib import Path
import pandas as pd
from infra.workspace import Workspace
from ml.curation import clips
from ml.sections import Clips
root, settings = Path(sys.argv[1]), Clips.model_validate_json(sys.argv[3])
videos, shots = pd.read_parquet(root / "videos.parquet"), pd.read_parquet(root / "shots.parquet")
for group in clips.plan_groups(videos, shots, settings, Workspace(root), root / sys.argv[2]):
    print(*(row["sha256"] for row in clips.cut(group, settings, ("CC0-1.0",), Workspace(root))))
"""


def tables(space: Workspace, names: list[str], licence: str = "CC0-1.0") -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [{"path": name, "source": "here", "licence": licence, "text": "Noise."} for name in names]
    videos = probe.tabulate([probe.probe_row(row, space) for row in rows], "own", "one")
    sound = videos[videos.status == "ok"].to_dict("records")
    found = [shots.shots_of(space.resolve(video["path"]), video, SHOTS) for video in sound]
    return VIDEOS.conform(videos), pd.concat(found, ignore_index=True)


def cut_all(space: Workspace, videos: pd.DataFrame, found: pd.DataFrame, out: Path) -> pd.DataFrame:
    groups = clips.plan_groups(videos, found, SETTINGS, space, out)
    return clips.tabulate([row for g in groups for row in clips.cut(g, SETTINGS, LICENCES, space)])


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0.5, [(10, 10.5)]),
        (2.0, [(10, 12)]),
        (2.5, [(10, 11.25), (11.25, 12.5)]),
        (6.0, [(10, 12), (12, 14), (14, 16)]),
    ],
)
def test_spans_are_equal_parts_within_the_limits(length, expected):
    assert np.allclose(clips.spans(10, 10 + length, SETTINGS), expected)


def test_a_remainder_that_is_too_short_stays_visible():
    tight = Clips(min_seconds=1.9, max_seconds=2.0, fps=12, short_side_px=96, crf=20)
    assert np.allclose(clips.spans(0, 2.5, tight), [(0, 2), (2, 2.5)])


@pytest.mark.parametrize(
    ("width", "height", "aspect", "expected"),
    [
        (1280, 720, 1.0, (170, 96)),
        (720, 1280, 1.0, (96, 170)),
        (64, 48, 1.0, (64, 48)),
        (65, 49, 1.0, (64, 48)),
        (720, 576, 16 / 15, (128, 96)),
    ],
)
def test_sizes_are_even_square_and_never_enlarged(width, height, aspect, expected):
    size = clips.clip_size(width, height, aspect, 96)
    assert size == expected
    assert all(side % 2 == 0 for side in size)


def test_clips_hold_what_the_table_says(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    encode(tmp_path / "a.mp4", scene(1, 36) + scene(2, 72) + scene(3, 12), gop=48)
    table = cut_all(space, *tables(space, ["a.mp4"]), tmp_path / "out")
    assert table.status.tolist() == ["ok", "ok", "ok", "rejected"]
    assert table.reason.iloc[3] == "0.50 s is shorter than 1 s"
    assert table.num_frames.tolist() == [18, 18, 18, 0]
    assert table.fps.tolist() == [12, 12, 12, 0]
    assert set(table[table.status == "ok"][["width", "height"]].itertuples(index=False, name=None)) == {(128, 96)}
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_clip_shows_its_span_and_keeps_its_colours(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    frames = scene(1, 48, dx=3)
    source = encode(tmp_path / "a.mp4", frames)
    table = cut_all(space, *tables(space, ["a.mp4"]), tmp_path / "out")
    with footage.Reader(space.resolve(table.path.iloc[0])) as reader:
        cut = [footage.rgb(frame) for _, frame in reader.frames()]
    with footage.Reader(source) as reader:
        whole = [footage.rgb(frame.reformat(128, 96, interpolation="AREA")) for _, frame in reader.frames()]
    for index in (0, 5, 20, 23):
        errors = [np.abs(cut[index].astype(int) - frame.astype(int)).mean() for frame in whole]
        assert int(np.argmin(errors)) == 2 * index  # 24 to 12 frames per second
        assert errors[2 * index] < 6


def test_a_group_that_starts_late_cuts_the_same_clip(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    encode(tmp_path / "a.mp4", scene(1, 48) + scene(2, 48), gop=20)
    videos, found = tables(space, ["a.mp4"])
    whole = clips.plan_groups(videos, found, SETTINGS, space, tmp_path / "whole")[0]
    late = clips.plan_groups(videos, found, SETTINGS, space, tmp_path / "late")[0]
    late = clips.Group(late.source, late.video, late.plans[1:])
    first = clips.cut(whole, SETTINGS, LICENCES, space)[1]
    second = clips.cut(late, SETTINGS, LICENCES, space)[0]
    assert first["clip_id"] == second["clip_id"]
    assert first["sha256"] == second["sha256"]


def test_a_killed_attempt_is_resumed_and_finished_clips_are_not_written_again(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    encode(tmp_path / "a.mp4", scene(1, 48) + scene(2, 48))
    videos, found = tables(space, ["a.mp4"])
    first = cut_all(space, videos, found, tmp_path / "out")
    kept, lost = (space.resolve(path) for path in first.path)
    stamp = kept.stat().st_mtime_ns
    lost.with_suffix(".partial").write_bytes(lost.read_bytes()[:100])
    lost.unlink()
    again = cut_all(space, videos, found, tmp_path / "out")
    assert again.equals(first)
    assert kept.stat().st_mtime_ns == stamp


def test_the_same_clip_gets_the_same_bytes_whatever_lay_in_memory_before(tmp_path, encode, texture):
    """glibc fills freed memory with a byte of our choice: an encoder that reads what it never wrote shows itself."""
    space = Workspace(tmp_path)
    frames = [np.ascontiguousarray(texture(1)[100 + i : 340 + i, 2 * i : 426 + 2 * i]) for i in range(96)]
    encode(tmp_path / "a.mp4", frames)
    large = SETTINGS.model_copy(update={"short_side_px": 240})
    videos, found = tables(space, ["a.mp4"])
    videos.to_parquet(tmp_path / "videos.parquet")
    found.to_parquet(tmp_path / "shots.parquet")
    digests = set()
    for fill in ("1", "85", "170"):
        command = [sys.executable, "-c", CUT, str(tmp_path), fill, large.model_dump_json()]
        root = Path(clips.__file__).parents[2]
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "MALLOC_PERTURB_": fill}, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout)
    assert len(digests) == 1
    assert len(digests.pop().split()) == 2


def test_other_settings_give_other_ids(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    encode(tmp_path / "a.mp4", scene(1, 48))
    videos, found = tables(space, ["a.mp4"])
    ids = {
        clips.plan_groups(videos, found, settings, space, tmp_path)[0].plans[0].clip_id
        for settings in (SETTINGS, SETTINGS.model_copy(update={"crf": 30}), SETTINGS.model_copy(update={"fps": 24}))
    }
    assert len(ids) == 3


def test_a_licence_that_the_recipe_forbids_is_not_cut(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    encode(tmp_path / "a.mp4", scene(1, 48))
    table = cut_all(space, *tables(space, ["a.mp4"], licence="Proprietary"), tmp_path / "out")
    assert table.reason.tolist() == ["licence Proprietary is not allowed by this recipe (corpus.licences)"]
    assert not (tmp_path / "out").exists()


def test_damage_in_the_middle_rejects_only_the_clips_it_touches(tmp_path, encode, scene):
    space = Workspace(tmp_path)
    path = encode(tmp_path / "a.mp4", scene(1, 48) + scene(2, 48) + scene(3, 48), gop=48)
    videos, found = tables(space, ["a.mp4"])
    data = bytearray(path.read_bytes())
    start, end = data.find(b"mdat") + 4, data.find(b"moov") - 4
    third = (end - start) // 3
    data[start + third + third // 3 : start + 2 * third - third // 6] = bytes(
        2 * third - third // 6 - third - third // 3
    )
    path.write_bytes(data)
    table = cut_all(space, videos, found, tmp_path / "out")
    assert table.status.tolist() == ["ok", "rejected", "ok"]
    assert "damaged" in table.reason.iloc[1] or "ended after" in table.reason.iloc[1]
