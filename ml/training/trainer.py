"""The training loop: resume, step, log, checkpoint, stop. What a step computes is `ml/training/step.py`'s business.

The trainer knows neither the model nor the objective nor how training is distributed: it pulls batches, has
`take_step` run them through the objective on the engine, keeps the moving average, and writes checkpoints that resume
exactly.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from infra.tracking import RunLog
from ml.batching.sampler import Batch, BatchStream
from ml.engines.protocol import Engine
from ml.training.checkpoint import CheckpointStore, Identity, Parts, Progress
from ml.training.curves import LossLog
from ml.training.ema import EMA
from ml.training.optim import step_generator
from ml.training.step import Objective, StepReport, take_step

LOGGED = ("loss", "lr", "grad_norm", "examples_per_second", "tokens_per_second", "data_wait_share")


class TrainingDiverged(RuntimeError):  # noqa: N818 (it says what happened)
    """A loss or gradient that is not finite, with the step and the examples it came from."""


class Preempted(RuntimeError):  # noqa: N818 (it is no error)
    """Training was asked to stop (SIGTERM) and did, after saving a checkpoint."""


@dataclass(frozen=True)
class Plan:
    """What a training run does: how many steps, what it keeps, and whose checkpoints it writes below `out`."""

    out: Path
    identity: Identity
    seed: int
    steps: int
    accumulate: int
    checkpoint_every: int
    keep_checkpoints: int
    ema_decay: float | None


class Trainer:
    """Runs a Plan; the objective makes a loss of each batch."""

    def __init__(
        self, engine: Engine, objective: Objective[Any], stream: BatchStream[Any], plan: Plan, log: RunLog
    ) -> None:
        self.engine, self.objective, self.stream, self.plan, self.log = engine, objective, stream, plan, log
        self.ema = EMA(engine.masters(), plan.ema_decay) if plan.ema_decay is not None else None
        self.store = CheckpointStore(plan.out / "checkpoints", plan.identity, plan.keep_checkpoints)
        self._parts = Parts(engine, self.ema, objective)

    def fit(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises TrainingDiverged, Preempted, and CheckpointMismatch when the folder holds another run's checkpoints.
        """
        done = self._resume()
        losses = LossLog(self.plan.out / "loss.csv", done)
        bar = tqdm(total=self.plan.steps, initial=done, desc=self.plan.identity.stage, unit="step", mininterval=1.0)
        with losses_closed(losses), bar, stop_asked() as asked:
            for step in range(done + 1, self.plan.steps + 1):
                row = self._step(step)
                terms = {f"loss_{name}": value for name, value in row.pop("terms").items()}
                losses.add(row)
                self.log.metrics({**{name: float(row[name]) for name in LOGGED}, **terms}, step=step)
                self.log.heartbeat()
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if asked or step == self.plan.steps or step % self.plan.checkpoint_every == 0:
                    self._save(step)
                if asked:
                    raise Preempted(f"asked to stop: saved step {step} of {self.plan.steps}")

    def weights(self) -> dict[str, torch.Tensor]:
        """What to export: the moving average if there is one, else the masters, full and fp32 on the CPU."""
        return self.engine.gather(self.ema.shards if self.ema else self.engine.masters())

    def _resume(self) -> int:
        place = self.store.newest()
        if place is None:
            return 0
        progress = self.store.load(place, self._parts)
        self.stream.restore(progress.sampler, progress.consumed)
        tqdm.write(f"resumed at step {progress.step} of {self.plan.steps}")
        return progress.step

    def _save(self, step: int) -> None:
        self.store.save(self._parts, Progress(step, self.stream.state(), self.stream.consumed))

    def _step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        fetched = [self.stream.next() for _ in range(self.plan.accumulate)]
        waited = time.perf_counter() - started
        lr = self.engine.learning_rate()
        generator = step_generator(self.engine.device, self.plan.seed, self.engine.data_rank, step)
        # Whatever draws from torch's global generator is as repeatable as what draws from ours.
        torch.manual_seed(generator.initial_seed())
        self.objective.begin(step)
        report = take_step(self.engine, self.objective, [data for _, data in fetched], generator)
        batches = [batch for batch, _ in fetched]
        self._check(step, report, batches)
        if self.ema:
            self.ema.update(self.engine.masters())
        seconds = time.perf_counter() - started
        return {
            "step": step,
            "loss": self.engine.mean(report.loss),
            "lr": lr,
            "grad_norm": report.grad_norm,
            "examples_per_second": report.examples * self.engine.data_size / seconds,
            "tokens_per_second": report.tokens * self.engine.data_size / seconds,
            "data_wait_share": waited / seconds,
            "seconds": seconds,
            "examples": report.examples,
            "tokens": report.tokens,
            "terms": report.terms,
            "bucket": "+".join(str(batch.cell) for batch in batches),
        }

    def _check(self, step: int, report: StepReport, batches: Sequence[Batch]) -> None:
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            return
        ids = ", ".join(name for batch in batches for name in batch.ids)
        raise TrainingDiverged(
            f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}, on examples {ids}. "
            f"Look at these examples, or lower the learning rate; the last checkpoint is from before this step."
        )


@contextmanager
def losses_closed(losses: LossLog) -> Iterator[None]:
    """Close the loss log whatever happens."""
    try:
        yield
    finally:
        losses.close()


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM arrives (a preempted node, a cancelled task); the old handler comes back."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
