import shutil
from pathlib import Path

import pytest

from infra.workspace import Workspace
from ml.curation import probe


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def row(path: str, licence: str = "CC0-1.0") -> dict[str, str]:
    return {"path": path, "source": "made here", "licence": licence, "text": ""}


def write_list(space: Workspace, text: str) -> None:
    path = space.shard_list("own", "one")
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")


def test_a_sound_video_is_measured(tmp_path, encode, scene):
    facts, reason = probe.inspect(encode(tmp_path / "a.mp4", scene(1, 50), fps=25))
    assert reason == ""
    assert (facts.width, facts.height, facts.num_frames, facts.codec) == (160, 120, 50, "h264")
    assert facts.fps == pytest.approx(25)
    assert facts.duration_seconds == pytest.approx(2.0)


def test_a_cut_off_file_is_rejected_although_it_opens(tmp_path, encode, scene):
    whole = encode(tmp_path / "a.mp4", scene(1, 96), movflags="faststart")
    remuxed = encode(tmp_path / "b.mkv", scene(1, 96))
    for path in (whole, remuxed):
        half = path.with_name(f"half{path.suffix}")
        half.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match="not a readable video"):
        probe.inspect(tmp_path / "half.mp4")  # its index stood at the end


def test_an_overwritten_tail_is_found_by_decoding_it(tmp_path, encode, scene):
    path = encode(tmp_path / "a.mp4", scene(1, 96), gop=24)
    data = bytearray(path.read_bytes())
    start, end = data.find(b"mdat") + 4, data.find(b"moov") - 4
    middle = start + (end - start) // 2
    data[middle:end] = bytes(end - middle)
    path.write_bytes(data)
    facts, reason = probe.inspect(path)
    assert facts.num_frames == 96  # the index still lists every frame
    assert "decodes only in part" in reason


def test_missing_frames_are_counted(tmp_path, encode, scene):
    path = encode(tmp_path / "a.mp4", scene(1, 96), gop=24)
    data = path.read_bytes()
    moov, mdat = data.find(b"moov") - 4, data.find(b"mdat") - 4
    path.write_bytes(data[:mdat] + data[moov:] + data[mdat:moov][: (moov - mdat) // 2])
    _, reason = probe.inspect(path)
    assert reason


def test_no_row_is_ever_lost(space, encode, scene):
    good = encode(space.root / "good.mp4", scene(1, 24))
    shutil.copy(good, space.root / "again.mp4")
    (space.root / "empty.mp4").touch()
    (space.root / "text.mp4").write_text("words " * 99)
    names = ["good.mp4", "again.mp4", "empty.mp4", "text.mp4", "gone.mp4", "gone.mp4"]
    encode(space.root / "free.mp4", scene(2, 24))
    rows = [probe.probe_row(row(name), space) for name in names] + [probe.probe_row(row("free.mp4", ""), space)]
    table = probe.tabulate(rows, "own", "one").set_index("path", append=True)
    assert table.status.tolist() == ["ok", *["rejected"] * 6]
    reasons = [
        "",
        "same bytes as good.mp4",
        "0 bytes",
        "not a readable video",
        "no such file",
        "listed twice",
        "no licence",
    ]
    for found, wanted in zip(table.reason, reasons, strict=True):
        assert wanted in found
    assert table.video_id.is_unique


def test_an_id_follows_the_bytes_and_not_the_name(space, encode, scene):
    path = encode(space.root / "a.mp4", scene(1, 24))
    before = probe.probe_row(row("a.mp4"), space)["video_id"]
    path.rename(space.root / "b.mp4")
    assert probe.probe_row(row("b.mp4"), space)["video_id"] == before


def test_an_empty_shard_says_so(space):
    write_list(space, "path,source,licence,text\n")
    with pytest.raises(probe.ProbeError, match="corpus own, shard one lists no videos"):
        probe.read_list(space, "own", "one")


def test_an_unknown_shard_names_the_known_ones(space):
    write_list(space, "path,source,licence,text\nx,,,\n")
    with pytest.raises(probe.ProbeError, match="shards of this corpus: one"):
        probe.read_list(space, "own", "two")


def test_a_list_without_its_columns_is_refused(space):
    write_list(space, "path,licence\na,b\n")
    with pytest.raises(probe.ProbeError, match="lacks column\\(s\\) source, text"):
        probe.read_list(space, "own", "one")
