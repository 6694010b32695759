"""Running a step: the key first, then what exists, then a task with its own MLflow run, and the pointer last."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from assets.steps import LOCAL, Entry, Function, Made, Step, StepError, Walk
from infra.compute.attempt import Attempts, Outcome
from infra.compute.resume import settle_parents
from infra.compute.supervise import GRACE_SECONDS
from infra.compute.task import SAVE_SECONDS, Launcher, Resources, Task
from infra.ledger import Purpose, bill
from infra.prices import price
from infra.runs import Bill, Status, Tag
from infra.settings import Settings
from infra.tracking import RunLog, Tracker
from ml.entry import RESULT, Call
from ml.sections import AutoencoderStage, Compute, Stage

ROOT = Path(__file__).resolve().parents[1]
# The entry whose tasks are trainings: several processes, and started again where they stopped.
TRAINING = "ml.train"
Folders = Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Done:
    """How a step came by its output: made now, or reused; with the run that made it and what this cost."""

    made: Made
    reused: bool
    cost_usd: float


class Watch:
    """What a person is shown while steps run; this one shows nothing, the CLI's shows progress."""

    def started(self, path: str) -> None:
        """A step's work begins."""

    def line(self, path: str, text: str) -> None:
        """A line of a task's log."""

    def ended(self, path: str, done: Done, seconds: float) -> None:
        """A step has its output."""


@dataclass(frozen=True)
class Runner:
    """Runs steps of a walk on a launcher, every attempt an MLflow run."""

    walk: Walk
    launcher: Launcher
    tracker: Tracker
    settings: Settings
    watch: Watch = field(default_factory=Watch)

    def run(
        self,
        step: Step,
        partition: str = "",
        tags: Mapping[str, str] | None = None,
        fresh: str = "",
    ) -> Done:
        """Make the step's output, or find that it exists already under the key it would get.

        `fresh` forces a new evaluation; without it the last one's is kept, so that nothing is made twice. Raises
        StepError when an input is missing, TaskFailed when the work fails, TrackingError when no run can be opened.
        """
        started = time.time()
        path = step.path(partition)
        present = self.walk.current(step, partition)
        fresh = fresh or (present.fresh if present else "")
        inputs = self.walk.inputs(step, partition)
        key = self.walk.key(step, partition, inputs, fresh)
        out = self.walk.workspace.step(path, key)
        if found := self.walk.finished(step, partition, key, fresh=fresh):
            run_id = present.run_id if present and present.key == key else self._adopt(step, path, out)
            return self._settle(step, partition, Done(replace(found, run_id=run_id), True, 0.0), started)
        out.mkdir(parents=True, exist_ok=True)
        self.watch.started(path)
        run_id, cost = self._work(step, partition, out, inputs, dict(tags or {}))
        made = self.walk.finished(step, partition, key, run_id, fresh)
        if made is None:
            raise StepError(f"{path}: the work ended without a result.json in {out}")
        return self._settle(step, partition, Done(made, reused=False, cost_usd=cost), started)

    def once(self, step: Step, out: Path, inputs: Folders) -> Outcome:
        """Run a step's task in a folder of its own, outside the walk: it gets a run and a bill, and no pointer to it.

        Raises StepError for work that is no task, TaskFailed when it fails, TrackingError when no run can be opened.
        """
        if not isinstance(step.work, Entry):
            raise StepError(f"{step.path()}: only a task runs outside the walk; this step is a function")
        return self._launch(self._task(step, step.work, "", out, inputs))

    def _settle(self, step: Step, partition: str, done: Done, started: float) -> Done:
        """Point at the output and tell whoever watches."""
        self.walk.point(step, partition, done.made)
        self.watch.ended(step.path(partition), done, time.time() - started)
        return done

    def _work(
        self,
        step: Step,
        partition: str,
        out: Path,
        inputs: Mapping[str, list[Made]],
        tags: Mapping[str, str],
    ) -> tuple[str, float]:
        """Do the step's work into `out`; the run id and the dollars."""
        folders = {name: tuple(m.folder for m in made) for name, made in inputs.items()}
        if isinstance(step.work, Function):
            return self._call(step, partition, Call(
                op=step.name,
                given_recipe=step.recipe,
                workspace=self.walk.workspace.root,
                out=out,
                inputs=folders,
                options={**step.options, **_shard(partition)},
                log=RunLog(None, None),
            ), tags)  # fmt: skip
        task = self._task(step, step.work, partition, out, folders)
        outcome = self._launch(replace(task, tags={**task.tags, **tags}))
        return outcome.run_id, outcome.cost_usd

    def _launch(self, task: Task) -> Outcome:
        return Attempts(self.launcher, self.tracker, partial(self.watch.line, task.name)).run(task)

    def _call(self, step: Step, partition: str, call: Call, tags: Mapping[str, str]) -> tuple[str, float]:
        """Run a small step in this process, on the bill unless it spends nothing worth a line."""
        assert isinstance(step.work, Function)  # narrowed by the caller
        if not step.work.billed:
            step.work.call(call)
            return "", 0.0
        self.tracker.check()
        path = step.path(partition)
        self._close_lost(step, path, call.out)
        about: dict[str, str] = {Tag.STEP: path, Tag.STEP_KEY: call.out.name, Tag.PURPOSE: step.purpose}
        run = self.tracker.open(self.experiment(step), path, {**self._tags(step, LOCAL), **about, **tags})
        started, status = time.time(), Status.FAILED
        log = RunLog(self.tracker.uri, run)
        try:
            step.work.call(replace(call, log=log))
            status = Status.FINISHED
        finally:
            log.close()
            spent = bill(time.time() - started, LOCAL.devices, price(LOCAL.price))
            failed: dict[str, str] = {Tag.PURPOSE: Purpose.FAILED, Tag.INTENDED_PURPOSE: step.purpose}
            self.tracker.close(run, status, spent, failed if status == Status.FAILED else {})
        return run, spent[Bill.COST_USD]

    def _adopt(self, step: Step, path: str, out: Path) -> str:
        """The run that made an output which nobody recorded: its orchestrator was killed before it could.

        An open run is closed with its cost, as what it is: finished.
        """
        if isinstance(step.work, Function) and not step.work.billed:
            return ""
        found = [r for r in self.tracker.runs(self.experiment(step), _by_key(out.name)) if r.name == path]
        ended = (out / RESULT).stat().st_mtime
        for run in (r for r in found if r.status == Status.RUNNING):
            compute = step.work.compute if isinstance(step.work, Entry) else LOCAL
            spent = bill(max(0.0, ended - run.started.timestamp()), compute.devices, price(compute.price))
            self.tracker.close(run.run_id, Status.FINISHED, spent)
            settle_parents(self.tracker)
        return next((r.run_id for r in found if r.status in (Status.FINISHED, Status.RUNNING)), "")

    def _close_lost(self, step: Step, path: str, out: Path) -> None:
        """Close the runs of in-process attempts that were killed, billed to the last thing they wrote."""
        found = self.tracker.runs(self.experiment(step), _by_key(out.name))
        last = max((file.stat().st_mtime for file in out.rglob("*")), default=0.0)
        for run in (r for r in found if r.status == Status.RUNNING and r.name == path):
            seconds = max(1.0, last - run.started.timestamp())
            failed: dict[str, str] = {Tag.PURPOSE: Purpose.FAILED, Tag.INTENDED_PURPOSE: step.purpose}
            spent = bill(seconds, LOCAL.devices, price(LOCAL.price))
            self.tracker.close(run.run_id, Status.KILLED, spent, failed)

    def _task(self, step: Step, work: Entry, partition: str, out: Path, inputs: Folders) -> Task:
        """The command of a step, with the resolved recipe written beside its output.

        A training starts as many processes on each node as its compute says, and is started again as its stage says.
        """
        arguments = [work.op, "--workspace", str(self.walk.workspace.root), "--out", str(out)]
        if step.recipe:
            document = out / "recipe.yaml"
            document.write_text(step.recipe.dump(), encoding="utf-8")
            arguments += ["--recipe", str(document)]
        for name, folders in inputs.items():
            arguments += [part for folder in folders for part in ("--input", f"{name}={folder}")]
        options = {**step.options, **_shard(partition)}
        arguments += [part for pair in options.items() for part in ("--option", "=".join(pair))]
        phase = _phase(step, work)
        return Task(
            name=step.path(partition),
            module=work.module,
            arguments=tuple(arguments),
            out=out,
            resources=_resources(work.compute),
            purpose=step.purpose,
            experiment=self.experiment(step),
            tags=self._tags(step, work.compute),
            processes=work.compute.ranks // work.compute.nodes if phase else 1,
            retries=phase.survival.retries if phase else None,
            grace_seconds=SAVE_SECONDS if phase else GRACE_SECONDS,
        )

    def experiment(self, step: Step) -> str:
        """MLflow experiment of a step: one a recipe and profile, one for raw corpora."""
        return f"opensora/{step.recipe.id if step.recipe else 'corpus'}"

    def _tags(self, step: Step, compute: Compute) -> dict[str, str]:
        recipe: dict[str, str] = {Tag.RECIPE: step.recipe.name, Tag.PROFILE: step.recipe.profile} if step.recipe else {}
        return {
            **recipe,
            Tag.ACCELERATORS: compute.accelerators,
            Tag.DEVICES: str(compute.devices),
            Tag.NODES: str(compute.nodes),
            Tag.PRICE_ROW: compute.price,
            Tag.USD_PER_HOUR: str(price(compute.price).usd_per_hour),
            Tag.GIT_COMMIT: commit(),
        }


def commit() -> str:
    """Commit of the code that runs, with `-dirty` for uncommitted changes; `unknown` outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _phase(step: Step, work: Entry) -> Stage | AutoencoderStage | None:
    """The training stage that a step's task is, if it is one."""
    if work.module != TRAINING or step.recipe is None:
        return None
    return next(phase for phase in step.recipe.phases if phase.name == step.options["stage"])


def _by_key(key: str) -> str:
    return f"tags.{Tag.STEP_KEY} = '{key}'"


def _shard(partition: str) -> dict[str, str]:
    """A partition `corpus.shard` as the options that a task takes."""
    corpus, _, shard = partition.partition(".")
    return {"corpus": corpus, "shard": shard} if partition else {}


def _resources(compute: Compute) -> Resources:
    return Resources(compute.accelerators, compute.nodes, compute.price, compute.infra, compute.use_spot)
