"""The workspace: one folder that holds corpora, steps, the data repository, caches and the embedded MLflow.

corpora/<corpus>/files/...           footage
corpora/<corpus>/shards/<shard>.csv  list of a shard: path, source, licence, text
steps/<step path>/<key>/             output of one step; `result.json` is written last
data/  dvc-remote/                   DVC data repository and its folder remote
cache/  site/                        downloads and converted weights; validation reports
mlflow.db  mlartifacts/              embedded MLflow
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = "result.json"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class WorkspaceError(ValueError):
    """A name or a file that the workspace cannot hold, with what to do about it."""


@dataclass(frozen=True)
class Workspace:
    """Every place below one root; nothing is made until somebody writes there."""

    root: Path

    def corpus(self, name: str) -> Path:
        """Folder of a corpus; raises WorkspaceError for a name that is not one plain folder name."""
        return self.root / "corpora" / _plain(name, "corpus")

    def shard_list(self, corpus: str, shard: str) -> Path:
        """CSV file that lists the videos of a shard, with columns path, source, licence, text."""
        return self.corpus(corpus) / "shards" / f"{_plain(shard, 'shard')}.csv"

    def shards(self, corpus: str) -> list[str]:
        """Names of the shards that a corpus has, sorted; none when it was never added."""
        return sorted(path.stem for path in (self.corpus(corpus) / "shards").glob("*.csv"))

    def step(self, step_path: str, key: str) -> Path:
        """Output folder of a step (`v2_0-tiny/shots/live`) for one digest of its inputs."""
        parts = [_plain(part, "step path") for part in step_path.split("/")]
        return self.root.joinpath("steps", *parts, _plain(key, "step key"))

    def finished(self, step_path: str, key: str) -> dict[str, Any] | None:
        """The result that a finished step left behind, or None; raises WorkspaceError if it cannot be read."""
        path = self.step(step_path, key) / RESULT
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise WorkspaceError(f"{path} is not JSON ({error}); remove the file to run the step again") from error
        if not isinstance(result, dict):
            raise WorkspaceError(f"{path} holds no mapping; remove the file to run the step again")
        return result

    @property
    def data_repo(self) -> Path:
        """The DVC data repository."""
        return self.root / "data"

    @property
    def dvc_remote(self) -> Path:
        """The folder that serves as DVC remote unless the settings name another."""
        return self.root / "dvc-remote"

    @property
    def cache(self) -> Path:
        """Downloads and converted weights: safe to delete, slow to make again."""
        return self.root / "cache"

    @property
    def site(self) -> Path:
        """Validation reports as web pages."""
        return self.root / "site"

    @property
    def tracking_db(self) -> Path:
        """SQLite file of the embedded MLflow."""
        return self.root / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """Artifacts of the embedded MLflow: pictures and small files, never weights."""
        return self.root / "mlartifacts"

    def relative(self, path: Path) -> str:
        """The path as a manifest writes it: relative to the root with slashes, or absolute if it lies outside."""
        absolute = path.absolute()
        root = self.root.absolute()
        return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.as_posix()

    def resolve(self, text: str) -> Path:
        """The file that a manifest means: the inverse of `relative`."""
        return self.root / text


def _plain(name: str, what: str) -> str:
    """The name, if it is one folder name: a `..` or a slash would leave the workspace."""
    if not _NAME.match(name):
        raise WorkspaceError(f"{what} {name!r}: use letters, digits, '_', '-' and '.', starting with a letter or digit")
    return name
