"""Checkpoints: everything needed to go on exactly where training stopped, whole or not there at all.

    checkpoints/step-00000040/  masters-00000-of-00002.safetensors   fp32 weights by the unwrapped model's names
                                moments-00000-of-00002.safetensors   what AdamW keeps: mean/<name>, square/<name>
                                average-00000-of-00002.safetensors   the moving average of the weights
                                random-00000-of-00002.safetensors    torch's global generators, of every rank
                                objective/                           what an objective trains itself (a discriminator)
                                state.json                           all else, the sha256 of every file and of itself

Tensors are full, so any engine on any number of ranks takes them back; each rank writes its share of the names. `save`
copies them and returns; a thread of each rank writes its files into `step-00000040.partial` and then leaves a note of
their digests. The main rank's thread waits for all the notes, seals `state.json` and renames the folder. Threads of
different ranks know of each other by these files alone: all ranks must see one folder.
"""

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from infra.storage import atomic_write, sha256_of
from ml.engines.protocol import Engine, Moments, Tensors
from ml.models.weights import CheckpointMismatch
from ml.training.ema import EMA
from ml.training.tensor_files import TensorFiles, sync, write

log = logging.getLogger(__name__)
STATE, OBJECTIVE, PARTIAL = "state.json", "objective", ".partial"
POLL_SECONDS = 0.05
# How long ranks that have not written their part yet are waited for when training has failed.
LAST_PATIENCE_SECONDS = 10.0


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or could not be written: what is missing, or does not match its digest."""


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
    """Where a training run stands: steps done, the sampler's state, and the sha256 of each file of its ledger.

    A `ledger` of None says that the ledger could not be written: no checkpoint is made that it does not lead up to.
    """

    step: int
    sampler: Mapping[str, Any]
    ledger: Mapping[str, str] | None = field(default_factory=dict)


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


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes: tensors by kind of file, and how many updates each weight has had."""

    tensors: Mapping[str, Tensors]
    updates: Mapping[str, int]


class CheckpointStore:
    """The checkpoints of one training run, in one folder; the newest `keep` of them.

    A checkpoint that cannot be written costs a warning and counts in `failures`; those before it stay. The main rank
    waits `patience_seconds` for the files of the others. All but `close` is together.
    """

    def __init__(
        self, folder: Path, identity: Identity, keep: int, engine: Engine, patience_seconds: float = 600.0
    ) -> None:
        self.folder, self.identity, self.keep, self.engine = folder, identity, keep, engine
        self.patience_seconds, self.failures = patience_seconds, 0
        self._writer: threading.Thread | None = None
        self._own_reason = ""  # why this rank could not write
        self._reason = ""  # why the last checkpoint is not there, as all ranks know it

    def save(self, parts: Parts, progress: Progress) -> None:
        """Copy everything and return; it is written behind. Waits for the checkpoint before, if that is still written.

        When it is whole, later checkpoints (those were broken) and too many older ones are dropped.
        """
        self._settle()
        partial = self._place(progress.step).with_suffix(PARTIAL)
        prepared = self._prepare(partial, parts.objective, progress) if self.engine.is_main else ""
        self._reason = self.engine.collect(prepared)[0]
        if self._reason:
            self.failures += 1
            return
        work = (partial, _snapshot(parts), progress)
        self._writer = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is whole; raises CheckpointError, on all ranks, when it will not be."""
        self._settle()
        if self._reason:
            raise CheckpointError(f"the last checkpoint was not saved in {self.folder}: {self._reason}")

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None; a broken one is passed over with a warning.

        Raises CheckpointMismatch when it belongs to another recipe or stage.
        """
        self._settle()
        name, mismatch = self.engine.collect(self._search() if self.engine.is_main else ("", ""))[0]
        if mismatch:
            raise CheckpointMismatch(mismatch)
        return self.folder / name if name else None

    def load(self, place: Path, parts: Parts) -> Progress:
        """Put a verified checkpoint back into engine, average and objective, and say where it stands."""
        engine, state = parts.engine, json.loads((place / STATE).read_text(encoding="utf-8"))
        mean, square = (TensorFiles(place, "moments", f"{kind}/") for kind in ("mean", "square"))
        engine.restore(TensorFiles(place, "masters"), Moments(mean, square, state["updates"]), state["step"])
        if parts.ema:
            parts.ema.restore(engine.scatter(TensorFiles(place, "average")))
        parts.objective.load(place / OBJECTIVE)
        _restore_random(place / f"random-{_share(engine)}", engine)
        return Progress(state["step"], state["sampler"], state["ledger"])

    def close(self, failed: bool = False) -> None:
        """Let the write under way come to its end, whatever it is; asks no other rank.

        When training `failed`, ranks that have not written yet may be gone: they are waited for a moment only.
        """
        if failed:
            self.patience_seconds = min(self.patience_seconds, LAST_PATIENCE_SECONDS)
        if self._writer is not None:
            self._writer.join()

    # --- by all ranks, in the thread that trains ------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait for the write under way and agree on how it went."""
        if self._writer is None:
            return
        self._writer.join()
        self._reason = next(filter(None, self.engine.collect(self._own_reason)), "")
        self.failures += bool(self._reason)
        if self._reason and self.engine.is_main:
            # A rank that was still writing when the main one gave up may have left files.
            self._sweep()
        self._writer, self._own_reason = None, ""

    def _prepare(self, partial: Path, objective: Stateful, progress: Progress) -> str:
        """An empty folder to write into, with the objective's part, which cannot be copied; why not, if not."""
        if progress.ledger is None:
            return self._give_up(partial, "the ledger of consumed examples could not be written")
        try:
            # What an attempt that was killed left behind takes the room that this one needs.
            self._sweep()
            (partial / OBJECTIVE).mkdir(parents=True)
            objective.save(partial / OBJECTIVE)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError when a disk is full
            return self._give_up(partial, _said(error))
        return ""

    def _sweep(self) -> None:
        for left in self.folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)

    def _search(self) -> tuple[str, str]:
        """Name of the newest whole checkpoint, and what is wrong with whose it is."""
        for place in sorted(self.folder.glob("step-????????"), reverse=True):
            try:
                found = Identity(**verify(place)["identity"])
            except CheckpointError as error:
                log.warning("%s; going back to the checkpoint before it", error)
                continue
            if found != self.identity:
                wish = "train into another folder, or remove it"
                return place.name, f"{place} belongs to {found}, this run is {self.identity}: {wish}"
            return place.name, ""
        return "", ""

    # --- in the thread that writes --------------------------------------------------------------------------------

    def _write(self, partial: Path, snapshot: Snapshot, progress: Progress) -> None:
        try:
            self._write_share(partial, snapshot)
            if self.engine.is_main:
                self._finish(partial, progress)
        except Exception as error:  # a thread has nobody to raise to: `_settle` reads the reason
            self._own_reason = _said(error)
            if self.engine.is_main:
                self._give_up(partial, self._own_reason)
            else:
                self._withdraw(partial)

    def _write_share(self, partial: Path, snapshot: Snapshot) -> None:
        share = _share(self.engine)
        files = {f"{kind}-{share}": write(partial / f"{kind}-{share}", t) for kind, t in snapshot.tensors.items()}
        note = json.dumps({"files": files, "updates": dict(snapshot.updates)})
        atomic_write(_note(partial, self.engine.rank), note)

    def _finish(self, partial: Path, progress: Progress) -> None:
        """On the main rank: seal the checkpoint when all have written, put it in its place, drop others."""
        notes = self._await_notes(partial)
        files = {name: digest for note in notes for name, digest in note["files"].items()}
        for path in sorted((partial / OBJECTIVE).rglob("*")):
            sync(path)
            files |= {path.relative_to(partial).as_posix(): sha256_of(path)} if path.is_file() else {}
        state = {
            "identity": asdict(self.identity),
            "step": progress.step,
            "sampler": dict(progress.sampler),
            "ledger": dict(progress.ledger or {}),
            "updates": {name: count for note in notes for name, count in note["updates"].items()},
            "files": files,
        }
        atomic_write(partial / STATE, json.dumps({**state, "sha256": _digest(state)}, indent=1, sort_keys=True))
        sync(partial)
        place = self._place(progress.step)
        if place.exists():
            _remove(place)
        partial.rename(place)
        sync(self.folder)
        self._prune(place)

    def _await_notes(self, partial: Path) -> list[dict[str, Any]]:
        """What all ranks said they wrote; their notes are taken away."""
        notes = [_note(partial, rank) for rank in range(self.engine.size)]
        began = time.monotonic()
        while missing := [rank for rank, note in enumerate(notes) if not note.is_file()]:
            if failed := [rank for rank in missing if notes[rank].with_suffix(".failed").is_file()]:
                said = notes[failed[0]].with_suffix(".failed").read_text(encoding="utf-8")
                raise CheckpointError(f"rank {failed[0]} could not write: {said or 'it could not even say why'}")
            if time.monotonic() - began > self.patience_seconds:
                raise CheckpointError(f"rank {missing[0]} did not write its files in {self.patience_seconds:g} s")
            time.sleep(POLL_SECONDS)
        found = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
        for note in notes:
            note.unlink()
        return found

    def _withdraw(self, partial: Path) -> None:
        """Not on the main rank: free the room and tell the main rank, as far as the disk lets us."""
        with suppress(OSError):
            for path in partial.glob(f"*-{_share(self.engine)}"):
                path.unlink()
            _note(partial, self.engine.rank).with_suffix(".failed").write_text(self._own_reason, encoding="utf-8")

    def _give_up(self, partial: Path, reason: str) -> str:
        shutil.rmtree(partial, ignore_errors=True)
        log.warning("checkpoint %s was not saved: %s; training goes on, those before it stay", partial.stem, reason)
        return reason

    def _prune(self, saved: Path) -> None:
        # What lies beyond the step just saved was broken, or this run would have gone on from it: it must not take
        # the place of a whole one.
        places = sorted(self.folder.glob("step-????????"), reverse=True)
        beyond = [place for place in places if place.name > saved.name]
        for place in [*beyond, *places[len(beyond) + self.keep :]]:
            with suppress(OSError):  # one too many does no harm
                _remove(place)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def verify(place: Path) -> dict[str, Any]:
    """The state of a checkpoint; raises CheckpointError naming the first file that does not match its digest."""
    try:
        state = json.loads((place / STATE).read_text(encoding="utf-8"))
        sealed = state.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {place} has no readable {STATE}: {error}") from error
    if sealed != _digest(state):
        raise CheckpointError(f"checkpoint {place}: {STATE} does not match its digest")
    names = sorted(state["files"])
    for name in names:
        if not (place / name).is_file():
            raise CheckpointError(f"checkpoint {place} lacks {name}")
    with ThreadPoolExecutor(max_workers=4) as readers:
        for name, digest in zip(names, readers.map(lambda name: sha256_of(place / name), names), strict=True):
            if digest != state["files"][name]:
                raise CheckpointError(f"checkpoint {place}: {name} does not match its digest")
    return dict(state)


def _snapshot(parts: Parts) -> Snapshot:
    """Copies of everything that the next step changes: this rank's share of it."""
    engine, moments = parts.engine, parts.engine.moments()
    kept = {kind: engine.gather(getattr(moments, kind), spread=True) for kind in ("mean", "square")}
    tensors = {
        "masters": engine.gather(engine.masters(), spread=True),
        "moments": {f"{kind}/{name}": tensor for kind, full in kept.items() for name, tensor in full.items()},
        "random": {"cpu": torch.get_rng_state()},
    }
    if parts.ema:
        tensors["average"] = engine.gather(parts.ema.shards, spread=True)
    if engine.device.type == "cuda":
        tensors["random"]["cuda"] = torch.cuda.get_rng_state(engine.device)
    return Snapshot(tensors, dict(moments.updates))


def _restore_random(path: Path, engine: Engine) -> None:
    """The global generators of this rank, if the checkpoint was saved on as many: batches seed generators of their own.

    On another number of ranks there is nothing to take back.
    """
    if not path.is_file():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if engine.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], engine.device)


def _share(engine: Engine) -> str:
    """The end of the names of a rank's files."""
    return f"{engine.rank:05d}-of-{engine.size:05d}.safetensors"


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def _remove(place: Path) -> None:
    """Drop a checkpoint so that a half-removed one is never looked at."""
    gone = place.with_suffix(f".old{PARTIAL}")
    shutil.rmtree(gone, ignore_errors=True)
    place.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
