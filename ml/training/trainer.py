"""The training loop: resume, step, log, look, save, stop. What a step computes is `ml/training/step.py`'s business.

The trainer knows neither the model nor the objective nor how training is distributed: it pulls batches, has
`take_step` run them through the objective on the engine, keeps the moving average, and writes checkpoints that resume
exactly, on any number of ranks. Every rank runs this loop; what is written once is written by the main one.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ml.training.exits import Preempted, explain_oom, is_oom
from ml.training.guard import Guard, TrainingDiverged
from ml.training.meter import Meter
from ml.training.optim import step_generator
from ml.training.record import Record
from ml.training.step import Objective, StepReport, take_step
from ml.training.stopping import stop_asked
from ml.training.watch import Watch

NOT_FINITE = "loss or gradient not finite"


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


@dataclass(frozen=True)
class Aids:
    """What stands beside the loop: the run's log, the meter, and a look at the weights, called after every step."""

    log: RunLog
    meter: Meter
    look: Callable[[int, "Trainer"], None] | None = None
    run_id: str = ""


class Trainer:
    """Runs a Plan; the objective makes a loss of each batch. Every rank has one."""

    def __init__(
        self, engine: Engine, objective: Objective[Any], stream: BatchStream[Any], plan: Plan, aids: Aids
    ) -> None:
        self.engine, self.objective, self.stream, self.plan, self.aids = engine, objective, stream, plan, aids
        self.ema = EMA(engine.masters(), plan.ema_decay) if plan.ema_decay is not None else None
        self.store = CheckpointStore(plan.out / "checkpoints", plan.identity, plan.keep_checkpoints, engine)
        self.ledger = Ledger(plan.out / "consumed", engine)
        self.record = Record(
            plan.out / "loss.csv", plan.identity.stage, plan.steps, aids.log if engine.is_main else None
        )
        self.watch = Watch(plan.out, engine.rank, plan.hang_seconds, aids.run_id)
        self._guard = Guard(plan.guard)
        # The steps that a rollback would pass over, newest last.
        self._late: deque[tuple[int, tuple[Batch, ...]]] = deque(maxlen=plan.guard.patience)
        self._parts = Parts(engine, self.ema, objective)

    def fit(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises TrainingDiverged, Preempted, OutOfMemory, CheckpointError when the last checkpoint cannot be written, and
        CheckpointMismatch when the folder holds another run's checkpoints.
        """
        with ExitStack() as around:
            asked = around.enter_context(stop_asked(self.plan.out))
            around.enter_context(self.watch)
            around.callback(self.store.close)
            self.watch.beat(0, "resuming")
            done = self._resume()
            around.enter_context(self.record.opened(done))
            while done < self.plan.steps:
                done = self._advance(done + 1, asked)

    def weights(self) -> dict[str, torch.Tensor]:
        """What to export, on the main rank: the moving average if there is one, else the masters, full, on the CPU."""
        return self.engine.gather(self.ema.shards if self.ema else self.engine.masters())

    def _advance(self, step: int, asked: Callable[[], str]) -> int:
        """Make one step and what belongs to it; the step that training stands at then."""
        self.watch.beat(step, "waiting for data")
        row, report, batches = self._step(step, asked)
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
        if report.asked or last or step % self.plan.checkpoint_every == 0:
            self._save(step, must=report.asked or last)
        if report.asked and not last:
            reason = next(filter(None, self.engine.collect(asked())), "another rank was asked")
            raise Preempted(f"asked to stop ({reason}): saved step {step} of {self.plan.steps}", step)
        if self.aids.look is not None:
            self.watch.beat(step, "looking")
            with self.aids.meter.lost("validation"):
                self.aids.look(step, self)
        return step

    def _step(self, step: int, asked: Callable[[], str]) -> tuple[dict[str, Any], StepReport, tuple[Batch, ...]]:
        started = time.perf_counter()
        fetched = [self.stream.next() for _ in range(self.plan.engine.accumulate)]
        waited = time.perf_counter() - started
        batches = tuple(batch for batch, _ in fetched)
        lr = self.engine.learning_rate()
        self.watch.beat(step, "computing")
        self.objective.begin(step)
        data = [one for _, one in fetched]
        try:
            report = take_step(self.engine, self.objective, data, self._generators(batches), lambda: bool(asked()))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_oom(error):
                raise
            stage = self.plan.identity.stage
            raise explain_oom(error, batches[0].cell, data, stage, self.plan.engine) from error
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
        self.record.cut(done)
        self.aids.meter.thrown_away(step - done)
        self.record.say(f"step {step} went wrong: back at step {done}, past {_names(spoiled)}")
        return done

    def _save(self, step: int, must: bool) -> None:
        self.watch.beat(step, "saving")
        with self.aids.meter.lost("checkpoint"):
            ledger = self.ledger.flush(step)
            self.store.save(self._parts, Progress(step, self.stream.state(), ledger))
            if must:
                self.store.wait()


def _names(batches: Sequence[Batch]) -> str:
    return ", ".join(name for batch in batches for name in batch.ids)
