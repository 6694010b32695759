"""Checkpoints: everything needed to go on exactly where training stopped, whole or not there at all.

    checkpoints/step-00000040/  master.safetensors  ema.safetensors  optimizer/  scheduler.pt  consumed.json  state.json
                                objective/ (what an objective trains of its own: a discriminator)

A checkpoint is written beside its place and renamed into it; `state.json` holds the sha256 of every other file and of
itself, all checked before anything is loaded. Random numbers need no file: each step seeds its own generator from
(seed, data rank, step).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file

from infra.storage import sha256_of
from ml.engines.protocol import Engine
from ml.models.weights import CheckpointMismatch
from ml.training.ema import EMA

log = logging.getLogger(__name__)
STATE, CONSUMED, AVERAGE, OBJECTIVE = "state.json", "consumed.json", "ema.safetensors", "objective"


class CheckpointError(ValueError):
    """A checkpoint that is not whole: what is missing or does not match its digest."""


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is: recipe id, stage name, and the digest of the recipe sections that decide the training."""

    recipe: str
    stage: str
    digest: str

    def __str__(self) -> str:
        return f"{self.recipe}/{self.stage} ({self.digest})"


@dataclass(frozen=True)
class Progress:
    """Where a training run stands: steps done, the sampler's position, and how often each id was consumed."""

    step: int
    sampler: Mapping[str, int]
    consumed: Mapping[str, int]


class Stateful(Protocol):
    """What an objective keeps between steps, if anything."""

    def save(self, folder: Path) -> None:
        """Write it into a folder, whole."""
        ...

    def load(self, folder: Path) -> None:
        """Take it back."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of beside progress: engine, average of the weights, and the objective's own state."""

    engine: Engine
    ema: EMA | None
    objective: Stateful


class CheckpointStore:
    """The checkpoints of one training run, in one folder; the newest `keep` of them."""

    def __init__(self, folder: Path, identity: Identity, keep: int) -> None:
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, parts: Parts, progress: Progress) -> Path:
        """Write a checkpoint (every rank calls this), drop later and too many older ones, and return its folder."""
        engine, ema = parts.engine, parts.ema
        place = self.folder / f"step-{progress.step:08d}"
        partial = place.with_suffix(".partial")
        if engine.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save(partial)
        average = engine.gather(ema.shards) if ema else None
        if engine.is_main:
            if average is not None:
                save_file({name: tensor.contiguous() for name, tensor in average.items()}, partial / AVERAGE)
            (partial / OBJECTIVE).mkdir()
            parts.objective.save(partial / OBJECTIVE)
            (partial / CONSUMED).write_text(json.dumps(dict(progress.consumed), sort_keys=True), encoding="utf-8")
            self._seal(partial, progress)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            self._prune(place)
        engine.barrier()
        return place

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None; a broken one is passed over with a warning.

        Raises CheckpointMismatch when it belongs to another recipe or stage.
        """
        for place in sorted(self.folder.glob("step-????????"), reverse=True):
            try:
                state = verify(place)
            except CheckpointError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                continue
            found = Identity(**state["identity"])
            if found != self.identity:
                raise CheckpointMismatch(
                    f"{place} belongs to {found}, this run is {self.identity}: train into another folder, or remove it"
                )
            return place
        return None

    def load(self, place: Path, parts: Parts) -> Progress:
        """Put a verified checkpoint back into engine, average and objective, and say where it stands."""
        parts.engine.load(place)
        if parts.ema:
            parts.ema.restore(parts.engine.scatter(load_file(place / AVERAGE)))
        parts.objective.load(place / OBJECTIVE)
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        consumed = json.loads((place / CONSUMED).read_text(encoding="utf-8"))
        return Progress(state["step"], state["sampler"], consumed)

    def _seal(self, partial: Path, progress: Progress) -> None:
        files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in partial.rglob("*") if path.is_file()}
        state = {
            "identity": asdict(self.identity),
            "step": progress.step,
            "sampler": dict(progress.sampler),
            "files": files,
        }
        content = json.dumps({**state, "sha256": _digest(state)}, indent=1, sort_keys=True)
        (partial / STATE).write_text(content, encoding="utf-8")

    def _prune(self, saved: Path) -> None:
        # What lies beyond the step just saved was broken, or this run would have gone on from it: it must not take
        # the place of a whole one.
        places = sorted(self.folder.glob("step-????????"), reverse=True)
        beyond = [place for place in places if place.name > saved.name]
        for place in [*beyond, *places[len(beyond) + self.keep :]]:
            shutil.rmtree(place)


def verify(place: Path) -> dict[str, Any]:
    """The state of a checkpoint; raises CheckpointError naming the first file that does not match its digest."""
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        sealed = state.pop("sha256")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {place} has no readable {STATE}: {error}") from error
    if sealed != _digest(state):
        raise CheckpointError(f"checkpoint {place}: {STATE} does not match its digest")
    for name, digest in state["files"].items():
        if not (place / name).is_file():
            raise CheckpointError(f"checkpoint {place} lacks {name}")
        if sha256_of(place / name) != digest:
            raise CheckpointError(f"checkpoint {place}: {name} does not match its digest")
    return dict(state)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
