"""Dataset versions: real DVC, real git, a folder as remote, and S3 on this machine."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.versioning import DataRepo, VersionError

NAME = "v2_0-tiny"


@pytest.fixture(autouse=True)
def nobodys_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No git identity and no DVC settings to lean on."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def repo(tmp_path: Path) -> DataRepo:
    """A data repository that does not exist yet, with a folder as remote."""
    return DataRepo(tmp_path / "data", str(tmp_path / "remote"))


def manifest(folder: Path, text: str = "clip,caption\n") -> Path:
    """A folder with tables, one of them in a folder of its own."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    (folder / "examples.parquet").write_bytes(text.encode())
    (folder / "tables" / "ünïcode name.csv").write_bytes(b"\x00\xff\r\n")
    return folder


def clips(folder: Path, count: int = 3) -> list[tuple[Path, str]]:
    """Clip files and their names in a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(count):
        path = folder / f"{index}.mp4"
        path.write_bytes(bytes([index]) * 2000)
        files.append((path, f"clips/{index}.mp4"))
    return files


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def git(repo: DataRepo, *arguments: str) -> str:
    """What git says about the repository."""
    return subprocess.run(["git", "-C", repo.path, *arguments], capture_output=True, text=True, check=True).stdout


def test_a_version_comes_back_from_the_remote_alone(repo: DataRepo, tmp_path: Path) -> None:
    source, files = manifest(tmp_path / "step"), clips(tmp_path / "clips")
    revision = repo.freeze(source, NAME, "12 examples", files)
    assert revision.name == f"{NAME}/{revision.md5[:12]}"
    assert (revision.dataset, revision.message) == (NAME, "12 examples")
    assert git(repo, "rev-parse", f"{revision.name}^{{commit}}").strip() == revision.commit
    assert git(repo, "status", "--short") == ""
    expected = {**digests(source), **{name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in files}}

    shutil.rmtree(repo.path / ".dvc" / "cache")
    shutil.rmtree(source)
    restored = repo.checkout(revision.name, tmp_path / "back" / "dataset")
    assert restored == revision
    assert digests(tmp_path / "back" / "dataset") == expected
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["dataset"], "nothing else is left behind"
    (tmp_path / "back" / "dataset" / "examples.parquet").write_text("mine now")  # a restored file is one's own
    repo.checkout(revision.name, tmp_path / "again")
    assert digests(tmp_path / "again") == expected

    with pytest.raises(VersionError, match="not empty"):
        repo.checkout(revision.name, tmp_path / "back" / "dataset")
    with pytest.raises(VersionError, match=f"did you mean '{revision.name}'"):
        repo.checkout(revision.name[:-1], tmp_path / "other")


def test_the_same_content_is_the_same_version(repo: DataRepo, tmp_path: Path) -> None:
    assert repo.revisions() == []
    source, files = manifest(tmp_path / "step"), clips(tmp_path / "clips")
    first = repo.freeze(source, NAME, "first", files)
    copy = manifest(tmp_path / "elsewhere")
    assert repo.freeze(copy, NAME, "again, from elsewhere", files) == first
    assert git(repo, "rev-list", "--count", "HEAD").strip() == "1"

    changed = repo.freeze(manifest(source, "clip,caption\nx,y\n"), NAME, "second", files[1:])
    assert changed.md5 != first.md5
    assert git(repo, "rev-list", "--count", "HEAD").strip() == "2"
    assert repo.freeze(copy, NAME, "back to the first", files) == first
    assert git(repo, "status", "--short") == ""
    assert {revision.name for revision in repo.revisions(NAME)} == {first.name, changed.name}
    assert repo.revisions("another") == []
    blobs = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert len(blobs) == 3 + 2 + 1 + 2, "three clips, two tables, a changed table, two listings: no clip twice"


def test_frozen_clips_are_linked_and_tables_stay_ones_own(repo: DataRepo, tmp_path: Path) -> None:
    source, files = manifest(tmp_path / "step"), clips(tmp_path / "clips", 1)
    repo.freeze(source, NAME, "first", files)
    assert files[0][0].stat().st_nlink == 2, "one in the step's folder, one in the cache"
    assert files[0][0].stat().st_mode & 0o222 == 0, "frozen bytes are read-only"
    assert (source / "examples.parquet").stat().st_nlink == 1
    assert (source / "examples.parquet").stat().st_mode & 0o200


def test_damage_is_discovered(repo: DataRepo, tmp_path: Path) -> None:
    revision = repo.freeze(manifest(tmp_path / "step"), NAME, "first", clips(tmp_path / "clips", 1))
    clip = tmp_path / "clips" / "0.mp4"
    clip.chmod(0o644)
    clip.write_bytes(b"another film")  # in place: the cache holds the same inode
    clip.chmod(0o444)  # DVC trusts a cached file that is read-only
    with pytest.raises(VersionError, match=r"clips/0\.mp4 is not what was frozen"):
        repo.checkout(revision.name, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shutil.rmtree(repo.path / ".dvc" / "cache")
    for blob in (path for path in (tmp_path / "remote").rglob("*") if path.is_file()):
        blob.chmod(0o644)
        blob.unlink()
    with pytest.raises(VersionError, match=r"pull v2_0-tiny\.dvc` failed"):
        repo.checkout(revision.name, tmp_path / "back")
    assert git(repo, "worktree", "list").count("\n") == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(repo: DataRepo, tmp_path: Path, name: str) -> None:
    with pytest.raises(VersionError, match="not one plain folder name"):
        repo.freeze(manifest(tmp_path / "step"), name, "x")


def test_files_that_cannot_be_frozen_are_named(repo: DataRepo, tmp_path: Path) -> None:
    source, [(clip, _)] = manifest(tmp_path / "step"), clips(tmp_path / "clips", 1)
    for path, name, said in (
        (clip, "../out.mp4", "leaves the dataset"),
        (clip, "/abs.mp4", "leaves the dataset"),
        (clip, "examples.parquet", "stands twice"),
        (tmp_path / "missing.mp4", "clips/m.mp4", "is not a file"),
    ):
        with pytest.raises(VersionError, match=said):
            repo.freeze(source, NAME, "x", [(path, name)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionError, match="nothing to freeze"):
        repo.freeze(tmp_path / "empty", NAME, "x")
    assert not repo.path.exists()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of an S3 on this machine, holding one empty bucket `films`."""
    for key, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(key, value)
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/films", method="PUT")).close()
    yield address
    server.stop()


def test_a_version_comes_back_from_s3(tmp_path: Path, s3: str) -> None:
    repo = DataRepo(tmp_path / "data", "s3://films/dvc", endpoint_url=s3)
    source, files = manifest(tmp_path / "step"), clips(tmp_path / "clips")
    revision = repo.freeze(source, NAME, "to the bucket", files)
    shutil.rmtree(repo.path / ".dvc" / "cache")
    repo.checkout(revision.name, tmp_path / "back")
    expected = {**digests(source), **{name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in files}}
    assert digests(tmp_path / "back") == expected
    tracked = [repo.path / name for name in git(repo, "ls-files").splitlines()]
    assert not any(s3 in path.read_text() for path in tracked), "where the bytes are is no part of the history"


def test_two_freezes_at_once_wait_for_each_other(repo: DataRepo, tmp_path: Path) -> None:
    source = manifest(tmp_path / "step")
    program = "import sys, pathlib; from infra.versioning import DataRepo; a = sys.argv\n"
    program += "DataRepo(pathlib.Path(a[1]), a[2]).freeze(pathlib.Path(a[3]), a[4], a[4])\n"
    root = Path(__file__).parents[2]
    commands = [[sys.executable, "-c", program, repo.path, repo.remote_url, source, name] for name in ("one", "two")]
    workers = [subprocess.Popen(c, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}) for c in commands]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert {revision.dataset for revision in repo.revisions()} == {"one", "two"}
    assert time.time() - max(r.created.timestamp() for r in repo.revisions()) < 120
