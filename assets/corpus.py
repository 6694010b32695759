"""Raw corpora: videos as found, probed shard by shard. Shared by every recipe, so no recipe decides what is in them."""

import hashlib
from pathlib import Path

import pandas as pd

from assets.steps import Entry, Step
from infra.workspace import Workspace
from ml.sections import Compute

PROBE = Compute(accelerators="CPU:2", nodes=1, price="cpu-assume-2026")


def corpus_step(name: str) -> Step:
    """The `videos` table of one corpus, a partition a shard."""
    return Step(
        key=("corpus", name),
        group="corpus",
        description=(
            f"Videos of corpus `{name}` as found: path, sha256, source, licence, probe facts; one partition a shard. "
            "An unreadable file is a rejected row with its reason, never a missing one."
        ),
        work=Entry("ml.curate", "probe", PROBE),
        purpose="data",
        partitioned=True,
        kinds=frozenset({"python", "parquet"}),
        owner="team:data",
        table="videos",
        fingerprint=shard_fingerprint,
    )


def shard_fingerprint(workspace: Workspace, partition: str) -> str:
    """Digest of a shard's list and of the size and change time of every file on it: new footage makes it stale."""
    corpus, _, shard = partition.partition(".")
    path = workspace.shard_list(corpus, shard)
    if not path.is_file():
        return "no list"
    files = [_facts(workspace.resolve(name)) for name in pd.read_csv(path, dtype=str, keep_default_na=False)["path"]]
    return hashlib.sha256(path.read_bytes() + repr(files).encode()).hexdigest()[:16]


def _facts(path: Path) -> tuple[str, int, int]:
    if not path.is_file():
        return (path.name, 0, 0)
    stat = path.stat()
    return (path.name, stat.st_size, stat.st_mtime_ns)
