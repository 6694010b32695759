"""A step of the walk: what it reads, what makes it, and whether what exists is still what the recipe asks for.

An asset module lists steps; `assets/factory.py` turns each into a Dagster asset; `assets/tasks.py` runs one. A step's
output folder is named by a key: the digest of the recipe sections it reads and of the data versions of its inputs.
Same key, same folder, nothing to recompute; another threshold, another key from filtering onward.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.workspace import Workspace
from ml.entry import Call
from ml.recipe import Recipe
from ml.sections import Compute

CURRENT = "current.json"
LOCAL = Compute(accelerators="CPU:1", nodes=1, price="cpu-assume-2026")


class StepError(RuntimeError):
    """A step that cannot run, with what is missing and how to get it."""


@dataclass(frozen=True)
class Entry:
    """Work done by a task: `python -m module op`, on the hardware of `compute`."""

    module: str
    op: str
    compute: Compute


@dataclass(frozen=True)
class Function:
    """Work small enough for the orchestrator's own process: a function of a Call. `billed` opens an MLflow run."""

    call: Callable[[Call], None]
    billed: bool = True


@dataclass(frozen=True)
class Step:
    """One asset of the walk.

    `inputs` maps the name a task knows to the asset keys it reads, of which those named in `aside` do not decide its
    content; `reads` are the recipe sections that do; `fingerprint` adds what neither covers (a shard list, the votes so
    far).
    """

    key: tuple[str, str]
    group: str
    description: str
    work: Entry | Function
    purpose: str
    recipe: Recipe | None = None
    reads: tuple[str, ...] = ()
    inputs: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)
    partitioned: bool = False
    kinds: frozenset[str] = frozenset()
    owner: str = "team:pipeline"
    table: str = ""
    revision: int = 1
    fingerprint: Callable[[Workspace, str], str] | None = None

    @property
    def name(self) -> str:
        """The last part of the asset key."""
        return self.key[1]

    @property
    def code_version(self) -> str:
        """Digest of the recipe sections read and of the step's own revision, what Dagster calls the code version."""
        sections = self.recipe.digest(*self.reads) if self.recipe and self.reads else "-"
        return hashlib.sha256(f"{self.revision}:{sections}:{sorted(self.options.items())}".encode()).hexdigest()[:16]

    @property
    def upstream(self) -> tuple[tuple[str, str], ...]:
        """Asset keys of every input, each once, in order."""
        return tuple(dict.fromkeys(key for keys in self.inputs.values() for key in keys))

    def path(self, partition: str = "") -> str:
        """Step path in the workspace: `v2_0-tiny/clips/sample.film`, `corpus/sample/sample.film`."""
        first = self.recipe.id if self.recipe and self.key[0] == self.recipe.name else self.key[0]
        return "/".join(part for part in (first, self.name, partition) if part)


@dataclass(frozen=True)
class Made:
    """What a step left behind: its folder, its key, and the result its work wrote."""

    path: str
    key: str
    folder: Path
    result: Mapping[str, Any]
    run_id: str = ""
    fresh: str = ""

    @property
    def data_version(self) -> str:
        """Digest of the step's data files."""
        return str(self.result["data_version"])


@dataclass(frozen=True)
class Walk:
    """All steps that can be made, and the workspace they are made in."""

    steps: Mapping[tuple[str, str], Step]
    workspace: Workspace

    def step(self, key: tuple[str, str]) -> Step:
        """The step of an asset key; raises StepError for an unknown one."""
        if key not in self.steps:
            raise StepError(f"no step {'/'.join(key)}; known: {', '.join('/'.join(k) for k in self.steps)}")
        return self.steps[key]

    def current(self, step: Step, partition: str = "") -> Made | None:
        """What the step made last, or None."""
        pointer = self.workspace.root / "steps" / step.path(partition) / CURRENT
        if not pointer.is_file():
            return None
        record = json.loads(pointer.read_text(encoding="utf-8"))
        return self.finished(step, partition, record["key"], record["run_id"], record["fresh"])

    def finished(self, step: Step, partition: str, key: str, run_id: str = "", fresh: str = "") -> Made | None:
        """What the step made under this key, or None if it never finished."""
        path = step.path(partition)
        folder = self.workspace.step(path, key)
        result = self.workspace.finished(path, key)
        return Made(path, key, folder, result, run_id, fresh) if result is not None else None

    def point(self, step: Step, partition: str, made: Made) -> None:
        """Record that `made` is what the step has now."""
        pointer = self.workspace.root / "steps" / step.path(partition) / CURRENT
        partial = pointer.with_suffix(".partial")
        partial.write_text(json.dumps({"key": made.key, "run_id": made.run_id, "fresh": made.fresh}), encoding="utf-8")
        partial.replace(pointer)

    def partitions(self, step: Step) -> list[str]:
        """Partitions (`corpus.shard`) that a partitioned step has: every shard of every corpus it reads."""
        corpora = [step.name] if step.recipe is None else list(step.recipe.corpus.names)
        return [f"{corpus}.{shard}" for corpus in corpora for shard in self.workspace.shards(corpus)]

    def inputs(self, step: Step, partition: str) -> dict[str, list[Made]]:
        """The present outputs of everything a step reads; raises StepError naming what is missing.

        A partitioned input of an unpartitioned step is read over all shards of the recipe's corpora.
        """
        return {
            name: [m for key in keys for m in self._input(step, key, partition)] for name, keys in step.inputs.items()
        }

    def _input(self, step: Step, key: tuple[str, str], partition: str) -> list[Made]:
        upstream = self.step(key)
        if upstream.recipe is None and partition and not partition.startswith(f"{upstream.name}."):
            return []
        wanted = [""] if not upstream.partitioned else [partition] if partition else self.partitions(upstream)
        made = {name: self.current(upstream, name) for name in wanted}
        missing = [name for name, found in made.items() if found is None]
        if missing or not made:
            of = f" (shard {missing[0]})" if missing and missing[0] else ""
            raise StepError(
                f"{'/'.join(step.key)} reads {'/'.join(key)}{of}, which has not been made yet: materialise it first"
            )
        return [found for found in made.values() if found]

    def key(self, step: Step, partition: str, inputs: Mapping[str, list[Made]], fresh: str = "") -> str:
        """The key of the folder a step's output belongs into; `fresh` sets a re-evaluation apart from the last one."""
        deciding = {name: made for name, made in inputs.items() if name not in step.aside}
        content = {
            "step": "/".join(step.key),
            "code": step.code_version,
            "partition": partition,
            "inputs": {name: [m.data_version for m in made] for name, made in deciding.items()},
            "fingerprint": step.fingerprint(self.workspace, partition) if step.fingerprint else "",
            "fresh": fresh,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def state(self, step: Step, partition: str = "") -> str:
        """`missing`, `stale` or `up to date`: whether the present output is what the recipe and inputs ask for now.

        A step is stale too when anything above it is.
        """
        found = self.current(step, partition)
        if found is None:
            return "missing"
        for key in step.upstream:
            upstream = self.step(key)
            shards = [""] if not upstream.partitioned else [partition] if partition else self.partitions(upstream)
            if any(self.state(upstream, shard) != "up to date" for shard in shards if _belongs(upstream, shard)):
                return "stale"
        wanted = self.key(step, partition, self.inputs(step, partition), found.fresh)
        return "up to date" if found.key == wanted else "stale"


def _belongs(step: Step, partition: str) -> bool:
    """Whether a shard is one of this step's: a raw corpus has only its own."""
    return step.recipe is not None or not partition or partition.startswith(f"{step.name}.")
