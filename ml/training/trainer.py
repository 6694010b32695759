"""The training loop: resume, step, log, look, save, stop. What a step computes is `ml/training/step.py`'s business.

The trainer knows neither the model nor the objective nor how training is distributed: it pulls batches, has
`take_step` run them through the objective on the engine, keeps the moving average, and writes checkpoints that resume
exactly, on any number of ranks. Every rank runs this loop; what is written once is written by the main one.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from infra.tracking import RunLog
from ml.batching.sampler import Batch
from ml.batching.stream import BatchStream
from ml.engines.protocol import Engine
from ml.methods import Engine as EngineSection
from ml.methods import Guard as GuardSection
from ml.training.checkpoint import CheckpointStore, Identity, Parts, Progress
from ml.training.consumed import Ledger
from ml.training.ema import EMA
from ml.training.exits import NoMemory, Preempted, Short, explain_oom
from ml.training.guard import Guard, TrainingDiverged
from ml.training.meter import Meter
from ml.training.optim import step_generator
from ml.training.record import Record
from ml.training.step import Objective, StepReport, take_step
from ml.training.stopping import Asked, never
from ml.training.watch import Watch

NOT_FINITE = "loss or gradient not finite"
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class Plan:
    """What a training run does: how many steps, what it keeps, and whose checkpoints it writes below `out`."""

    out: Path
    identity: Identity
    seed: int
    steps: int
    checkpoint_every: int
    keep_checkpoints: int
    ema_decay: float | None
    engine: EngineSection
    guard: GuardSection
    hang_seconds: float
    autoencoder: bool = False


class Look(Protocol):
    """A look at the weights as they stand. Both are together."""

    def __call__(self, step: int, training: "Trainer") -> None:
        """A step was made."""
        ...

    def resumed(self, step: int, training: "Trainer") -> None:
        """Training goes on from a step, which an earlier attempt made and may not have looked at."""
        ...


@dataclass(frozen=True)
class Aids:
    """What stands beside the loop: the run's log, the meter, and a look at the weights."""

    log: RunLog
    meter: Meter
    look: Look | None = None
    run_id: str = ""
    asked: Asked = never


class Trainer:
    """Runs a Plan; the objective makes a loss of each batch. Every rank has one.

    A context manager: within it a watch looks after this rank, in `fit` and in what is made of the weights afterwards.
    """

    def __init__(
        self, engine: Engine, objective: Objective[Any], stream: BatchStream[Any], plan: Plan, aids: Aids
    ) -> None:
        self.engine, self.objective, self.stream, self.plan, self.aids = engine, objective, stream, plan, aids
        self.ema = EMA(engine.masters(), plan.ema_decay) if plan.ema_decay is not None else None
        # A checkpoint that does not come about must be known for one before this rank is taken to hang.
        patience = min(PATIENCE_SECONDS, plan.hang_seconds / 2)
        self.store = CheckpointStore(plan.out / "checkpoints", plan.identity, plan.keep_checkpoints, engine, patience)
        self.ledger = Ledger(plan.out / "consumed", engine)
        self.record = Record(
            plan.out / "loss.csv", plan.identity.stage, plan.steps, aids.log if engine.is_main else None
        )
        self.watch = Watch(plan.out, engine.rank, plan.hang_seconds, aids.run_id)
        self._micro_batches = plan.engine.micro_batches(engine.data_size)
        self._guard = Guard(plan.guard)
        # The steps that a rollback would pass over, newest last.
        self._late: deque[tuple[int, tuple[Batch, ...]]] = deque(maxlen=plan.guard.patience)
        self._due = False
        self._parts = Parts(engine, self.ema, objective)

    def __enter__(self) -> Self:
        self.watch.__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        self.store.close(failed=ended[0] is not None)
        self.watch.__exit__(*ended)

    def fit(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises TrainingDiverged, Preempted, OutOfMemory, CheckpointError when the last checkpoint cannot be written, and
        CheckpointMismatch when the folder holds another run's checkpoints.
        """
        self.watch.beat(0, "resuming")
        done = self._resume()
        if done < self.plan.steps and self.engine.total([float(bool(self.aids.asked()))])[0]:
            raise Preempted(f"asked to stop ({self._who()}) before step {done + 1}", done)
        with self.record.opened(done):
            while done < self.plan.steps:
                done = self._advance(done + 1)
        self.watch.beat(done, "exporting")

    def weights(self) -> dict[str, torch.Tensor]:
        """What to export, on the main rank: the moving average if there is one, else the masters, full, on the CPU."""
        return self.engine.gather(self.ema.shards if self.ema else self.engine.masters())

    def _advance(self, step: int) -> int:
        """Make one step and what belongs to it; the step that training stands at then."""
        self.watch.beat(step, "waiting for data")
        row, report, batches = self._step(step)
        self.ledger.add(step, batches, report.updated, "" if report.updated else NOT_FINITE)
        self._late.append((step, batches))
        if not report.updated:
            self.record.say(f"step {step}: {NOT_FINITE}, nothing was learned of {_names(batches)}")
        if self._guard.judge(report.loss, report.grad_norm) == "rollback":
            return self._roll_back(step)
        if self.ema and report.updated:
            self.ema.update(self.engine.masters())
        self.record.add(row, report.terms)
        last = step == self.plan.steps
        # What training may have to go back to is never saved after a step gone wrong, but after the next good one.
        self._due = self._due or step % self.plan.checkpoint_every == 0
        if report.asked or last or (self._due and report.updated):
            self._save(step, must=report.asked or last)
        if report.asked and not last:
            raise Preempted(f"asked to stop ({self._who()}): saved step {step} of {self.plan.steps}", step)
        if self.aids.look is not None:
            self._show(step, self.aids.look)
        return step

    def _show(self, step: int, look: Callable[[int, "Trainer"], None]) -> None:
        self.watch.beat(step, "looking")
        with self.aids.meter.lost("validation"):
            look(step, self)

    def _step(self, step: int) -> tuple[dict[str, Any], StepReport, tuple[Batch, ...]]:
        started, waited = time.perf_counter(), self.stream.waited
        fetched = [self.stream.next() for _ in range(self._micro_batches)]
        waited = self.stream.waited - waited
        batches = tuple(batch for batch, _ in fetched)
        lr = self.engine.learning_rate()
        self.watch.beat(step, "computing")
        self.objective.begin(step)
        data = [one for _, one in fetched]
        try:
            report = take_step(
                self.engine, self.objective, data, self._generators(batches), lambda: bool(self.aids.asked())
            )
        except NoMemory as error:
            short = Short(self.plan.identity.stage, self.plan.engine, self.engine.size, self.plan.autoencoder)
            raise explain_oom(error, [batch.cell for batch in batches], data, short) from error
        seconds = time.perf_counter() - started
        row = {
            "step": step,
            "loss": report.loss,
            "lr": lr,
            "grad_norm": report.grad_norm,
            "seconds": seconds,
            "examples": report.examples,
            "tokens": report.tokens,
            "bucket": "+".join(str(batch.cell) for batch in batches),
            **self.aids.meter.step(report, seconds, waited),
        }
        return row, report, batches

    def _who(self) -> str:
        """Who asked to stop. Together."""
        return next(filter(None, self.engine.collect(self.aids.asked())), "nobody")

    def _generators(self, batches: Sequence[Batch]) -> list[torch.Generator]:
        """Random numbers belong to a batch: whichever rank computes it, in whatever company, draws the same ones."""
        seed, device = self.plan.seed, self.engine.device
        return [step_generator(device, seed, batch.position.epoch, batch.position.index) for batch in batches]

    def _resume(self) -> int:
        place = self.store.newest()
        if place is None:
            self.ledger.cut(0)
            return 0
        with self.aids.meter.lost("resume"):
            step = self._return_to(place)
        self.aids.meter.redo(self.record.last() - step)
        self.record.say(f"resumed at step {step} of {self.plan.steps}")
        if self.aids.look is not None:
            self._show(step, self.aids.look.resumed)
        return step

    def _return_to(self, place: Path) -> int:
        progress = self.store.load(place, self._parts)
        self.stream.restore(progress.sampler)
        self.ledger.cut(progress.step, progress.ledger)
        return progress.step

    def _roll_back(self, step: int) -> int:
        """Go back to the last checkpoint, past the batches that spoiled the steps since."""
        where = f"step {step}, on examples {_names([batch for _, batches in self._late for batch in batches])}"
        self._guard.rolled_back(where)
        self.watch.beat(step, "rolling back")
        with self.aids.meter.lost("rollback"):
            place = self.store.newest()
            if place is None:
                raise TrainingDiverged(f"{where}: it went wrong before the first checkpoint was written")
            done = self._return_to(place)
        spoiled = [batch for first, batches in self._late if first > done for batch in batches]
        self.stream.skip(spoiled)
        self.ledger.pass_over(done + 1, spoiled, f"step {step} went wrong")
        self._late.clear()
        self._due = False
        self.record.cut(done)
        self.aids.meter.thrown_away(step - done)
        self.record.say(f"step {step} went wrong: back at step {done}, past {_names(spoiled)}")
        return done

    def _save(self, step: int, must: bool) -> None:
        self.watch.beat(step, "saving")
        with self.aids.meter.lost("checkpoint"):
            ledger = self.ledger.flush(step)
            self.store.save(self._parts, Progress(step, self.stream.state(), ledger))
            self._due = False
            if must:
                self.store.wait()


def _names(batches: Sequence[Batch]) -> str:
    return ", ".join(name for batch in batches for name in batch.ids)
