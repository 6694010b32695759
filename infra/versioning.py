"""The door of DVC: dataset versions, frozen in a data repository and restored byte for byte.

A data repository is a git repository of small `.dvc` files and a remote (a folder, or `s3://...`) that holds the bytes.
One dataset is one directory entry: DVC stores each file in it once under the digest of its bytes, so that a version
that drops a tenth of the clips adds a listing and no clip, and a push sends new files only. Tar shards would mean fewer
objects, but one changed clip rewrites a shard of up to 256 MB in every version. The listing is read as a whole: beyond
about a million clips, split the dataset into several names.

DVC is driven through its command line, its one stable interface; git gets its identity per call, so that an empty HOME
will do, and reads no configuration of the person who calls.
"""

import configparser
import contextlib
import difflib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from infra.settings import TELEMETRY_OFF
from infra.storage import atomic_write

REMOTE = "store"
DIGEST_DIGITS = 12
_IDENTITY = ("-c", "user.name=opensora", "-c", "user.email=opensora@localhost")
_PLAIN = ("-c", "commit.gpgSign=false", "-c", "tag.gpgSign=false", "-c", "core.hooksPath=")
_FIELDS = "%(refname:short)%00%(*objectname)%00%(creatordate:iso-strict)%00%(contents:subject)%00%(contents:body)%01"


class VersionError(RuntimeError):
    """A dataset version that cannot be frozen, found or restored: what, where, and what to do."""


@dataclass(frozen=True)
class Revision:
    """One frozen dataset version: `name` is `<dataset>/<first digits of md5>`, also its git tag; `md5` is DVC's."""

    name: str
    dataset: str
    commit: str
    md5: str
    message: str
    created: datetime


@dataclass(frozen=True)
class DataRepo:
    """A data repository at `path` whose bytes live at `remote_url`, a folder or a bucket.

    `endpoint_url` is for an S3 that is not Amazon's; credentials come from the environment, never from here.
    """

    path: Path
    remote_url: str
    endpoint_url: str | None = None

    def freeze(self, source: Path, dataset: str, message: str, files: Iterable[tuple[Path, str]] = ()) -> Revision:
        """Freeze the files of folder `source`, and `files` under their relative names, as a version of `dataset`.

        The folder's own files are copied: they are tables. `files` (clips) are hard-linked where the file system allows
        it and become read-only, so that no clip is stored twice on one disk. Content that was frozen before gives the
        revision it got then. Raises VersionError for an empty or unsafe set of files, and when DVC, git or the remote
        refuse; what was pushed by then is not pushed again.
        """
        _check_name(dataset)
        tables, linked = _content(source, files)
        with self._locked():
            self._init()
            target = self.path / dataset
            _fill(target, tables, linked)
            try:
                self._dvc("add", "--quiet", dataset)
                self._dvc("push", "--quiet", f"{dataset}.dvc")
            finally:
                _remove(target)
            md5 = _md5((self.path / f"{dataset}.dvc").read_text(encoding="utf-8"))
            tag = f"{dataset}/{md5[:DIGEST_DIGITS]}"
            if self._git("tag", "--list", tag):
                self._git("checkout", "--quiet", "HEAD", "--", f"{dataset}.dvc")
            else:
                self._commit(dataset, tag, message, md5)
        return self.revision(tag)

    def checkout(self, revision: str, dest: Path) -> Revision:
        """Restore a version, given by its name, into the new folder `dest`, from the cache or from the remote.

        Every byte is checked against the digest it was frozen under. Raises VersionError for an unknown revision,
        naming the nearest, for a `dest` that holds files already, and for bytes that the remote has lost or damaged.
        """
        found, dest = self.revision(revision), dest.absolute()
        if dest.is_dir() and any(dest.iterdir()):
            raise VersionError(f"{dest} is not empty; restore {found.name} into a new folder")
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.", suffix=".partial") as scratch:
            tree = Path(scratch) / "tree"
            self._git("worktree", "add", "--quiet", "--detach", str(tree), found.commit)
            try:
                self._configure(tree, cache=self.path / ".dvc" / "cache", links="reflink,copy")
                self._dvc("pull", "--quiet", f"{found.dataset}.dvc", cwd=tree)
                self._verify(tree / found.dataset, found)
                if dest.is_dir():
                    dest.rmdir()
                (tree / found.dataset).rename(dest)
            finally:
                self._git("worktree", "remove", "--force", str(tree))
        return found

    def revision(self, name: str) -> Revision:
        """The version of this name; raises VersionError naming the nearest when there is none."""
        known = {revision.name: revision for revision in self.revisions()}
        if name not in known:
            match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {match[0]!r}?" if match else f"it holds {', '.join(known) or 'none yet'}"
            raise VersionError(f"no dataset version {name!r} in {self.path}; {hint}")
        return known[name]

    def revisions(self, dataset: str | None = None) -> list[Revision]:
        """Every version, or every version of `dataset`, newest first."""
        if not (self.path / ".git").exists():
            return []
        pattern = "refs/tags" if dataset is None else f"refs/tags/{dataset}"
        listing = self._git("for-each-ref", "--sort=-creatordate", f"--format={_FIELDS}", pattern)
        return [_revision(entry.strip("\n")) for entry in listing.split("\x01") if entry.strip()]

    def _verify(self, folder: Path, revision: Revision) -> None:
        """Compare every restored file with DVC's listing: DVC itself trusts its cache."""
        store = self.path / ".dvc" / "cache" / "files" / "md5"
        for entry in json.loads((store / revision.md5[:2] / revision.md5[2:]).read_text(encoding="utf-8")):
            path, digest = folder / entry["relpath"], entry["md5"]
            with path.open("rb") as stream:
                intact = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == digest
            if not intact:
                where = store / digest[:2] / digest[2:]
                raise VersionError(
                    f"{revision.name}: {entry['relpath']} is not what was frozen; its copy in the cache was changed. "
                    f"Delete {where} and restore again: the remote still has it"
                )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One freeze at a time: git and DVC refuse a second writer instead of waiting for the first."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _init(self) -> None:
        """Make the repository on first use, and keep its remote what the settings say."""
        if not (self.path / ".git").exists():
            self._git("init", "--quiet", "--initial-branch=main")
        if not (self.path / ".dvc" / "config").is_file():
            self._dvc("init", "--quiet")
        self._configure(self.path, cache=None, links="hardlink,copy")

    def _configure(self, tree: Path, cache: Path | None, links: str) -> None:
        """Write `.dvc/config.local`: where bytes go is a fact of this installation, not of the version's history."""
        bucket = "://" in self.remote_url
        remote = {"url": self.remote_url if bucket else str(Path(self.remote_url).absolute()), "verify": "true"}
        if self.endpoint_url:
            remote["endpointurl"] = self.endpoint_url
        config = configparser.ConfigParser(interpolation=None)
        config["core"] = {"analytics": "false", "check_update": "false", "autostage": "false", "remote": REMOTE}
        config["cache"] = {"type": links, **({"dir": str(cache.absolute())} if cache else {})}
        config[f"'remote \"{REMOTE}\"'"] = remote
        text = io.StringIO()
        config.write(text)
        atomic_write(tree / ".dvc" / "config.local", text.getvalue())

    def _commit(self, dataset: str, tag: str, message: str, md5: str) -> None:
        """Commit the `.dvc` file and tag it; the tag's body carries DVC's digest."""
        self._git("add", "--", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", f"{dataset}.dvc")
        self._git("commit", "--quiet", "--allow-empty", "-m", message)
        self._git("tag", "--annotate", tag, "-m", message, "-m", f"md5: {md5}")

    def _git(self, *arguments: str) -> str:
        quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        return _run(["git", *_IDENTITY, *_PLAIN, *arguments], self.path, quiet)

    def _dvc(self, *arguments: str, cwd: Path | None = None) -> str:
        # DVC keeps indexes in a machine-wide folder unless it is told otherwise.
        private = {**TELEMETRY_OFF, "DVC_SITE_CACHE_DIR": str((self.path / ".dvc" / "tmp" / "site").absolute())}
        return _run([sys.executable, "-m", "dvc", *arguments], cwd or self.path, private)


def _run(command: list[str], cwd: Path, environment: Mapping[str, str]) -> str:
    """Standard output of a command; raises VersionError with what the command said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise VersionError(f"{command[0]} was not found; install it, dataset versions need it") from error
    if done.returncode:
        said = "\n".join(line for line in (done.stderr or done.stdout).splitlines() if line.strip())
        what = " ".join(part for part in command[1:] if not part.startswith(("-", "user.", "commit.", "tag.", "core.")))
        raise VersionError(f"`{what}` failed in {cwd}:\n{said}")
    return done.stdout


def _check_name(name: str) -> None:
    if PurePosixPath(name).name != name or name.startswith((".", "-")) or not name:
        raise VersionError(f"dataset name {name!r} is not one plain folder name, such as `v2_0-tiny`")


def _content(source: Path, files: Iterable[tuple[Path, str]]) -> tuple[dict[str, Path], dict[str, Path]]:
    """File of every relative name: of the folder's own files, and of the further ones."""
    if not source.is_dir():
        raise VersionError(f"{source} is not a folder; freeze the output folder of a finished step")
    tables = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    linked: dict[str, Path] = {}
    for path, relative in files:
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise VersionError(f"{relative!r} leaves the dataset; give a relative name without `..`")
        if not path.is_file():
            raise VersionError(f"{path} ({relative}) is not a file; run the step that makes it again")
        if pure.as_posix() in tables or pure.as_posix() in linked:
            raise VersionError(f"{relative!r} stands twice in the dataset")
        linked[pure.as_posix()] = path
    if not (tables or linked):
        raise VersionError(f"{source} holds no file; there is nothing to freeze")
    return tables, linked


def _fill(target: Path, tables: Mapping[str, Path], linked: Mapping[str, Path]) -> None:
    """Put every file under its name into a fresh folder."""
    _remove(target)
    for relative, path in {**tables, **linked}.items():
        place = target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        if relative in linked:
            _link(path, place)
        else:
            shutil.copyfile(path, place)


def _link(path: Path, place: Path) -> None:
    """A hard link, or a copy where the file system has none (another disk, a network mount)."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)


def _remove(target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)


def _md5(dvc_file: str) -> str:
    """DVC's digest of the one entry in a `.dvc` file."""
    lines = (line.strip().removeprefix("- ") for line in dvc_file.splitlines())
    return next(line.removeprefix("md5: ") for line in lines if line.startswith("md5: "))


def _revision(entry: str) -> Revision:
    tag, commit, created, message, body = entry.split("\0")
    return Revision(tag, tag.rpartition("/")[0], commit, _md5(body), message, datetime.fromisoformat(created))
