import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.tracking import RunLog
from ml.batching.buckets import Cell
from ml.batching.sampler import Batch, BucketSampler
from ml.batching.stream import BatchStream
from ml.engines.make import make_engine
from ml.methods import Engine, Guard
from ml.models.weights import CheckpointMismatch
from ml.sections import Adam, Compute
from ml.shapes import Size
from ml.training.checkpoint import Identity
from ml.training.consumed import counts, problems, read
from ml.training.curves import read_log
from ml.training.exits import OutOfMemory, Preempted
from ml.training.guard import TrainingDiverged
from ml.training.meter import Meter
from ml.training.optim import adamw, schedule
from ml.training.step import Loss, Objective
from ml.training.stopping import stop_asked
from ml.training.trainer import Aids, Look, Plan, Trainer

ADAM = Adam(lr=0.01, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=3)
CELL = Cell("48x80", 5, Size(48, 80))
IDS = [f"clip{i}" for i in range(7)]
EPOCH = 4  # batches of two, the last of one


class Noisy(Objective[Tensor]):
    """Linear regression with noise from the step's generator and from torch's own; `before` is called every step."""

    def __init__(self, before: Any = None) -> None:
        self.before, self.calls = before, 0

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        self.calls += 1
        if self.before is not None:
            self.before(self.calls)
        noise = (torch.randn(data.shape, generator=generator) + torch.rand(data.shape)).to(data.dtype)
        return Loss((engine.model(data + noise) - data).float().square().mean(), len(data), 10 * len(data))


class Remembering(Noisy):
    """An objective with a state of its own, which changes every loss: the sum of all batches so far."""

    def __init__(self, before: Any = None) -> None:
        super().__init__(before)
        self.seen, self.begun = torch.zeros(()), list[int]()

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        loss = super().loss(engine, data, generator)
        self.seen = self.seen + data.float().mean()
        return replace(loss, value=loss.value * (1 + self.seen / 100), terms={"seen": float(self.seen)})

    def save(self, folder: Path) -> None:
        torch.save(self.seen, folder / "seen.pt")

    def load(self, folder: Path) -> None:
        self.seen = torch.load(folder / "seen.pt", weights_only=True)


def load(batch: Batch) -> Tensor:
    return torch.tensor([[float(name.removeprefix("clip"))] * 3 for name in batch.ids])


def load_half(batch: Batch) -> Tensor:
    return load(batch).bfloat16()


def section(**over: Any) -> Engine:
    one = {"accumulate": 1, "sequence_parallel": 1, "checkpoint_blocks": (0, 0)}
    return Engine(**{"kind": "plain", "precision": "fp32", "grad_clip": 1.0, **one, **over})


def plan(out: Path, **over: Any) -> Plan:
    base = Plan(
        out=out,
        identity=Identity("v2_0-tiny", "stage1", "aaaa"),
        seed=5,
        steps=9,
        checkpoint_every=3,
        keep_checkpoints=2,
        ema_decay=0.8,
        engine=section(accumulate=2),
        guard=Guard(patience=2, rollbacks=1),
        hang_seconds=100.0,
    )
    return replace(base, **over)


def run(
    what: Plan,
    objective: Any = None,
    precision: str = "fp32",
    log: RunLog | None = None,
    ranks: int = 1,
    look: Look | None = None,
) -> Trainer:
    """Train a plan to its end, in as many ranks as there are."""
    torch.manual_seed(0)
    engine = make_engine(
        section(precision=precision), Compute(accelerators="CPU:1", nodes=1, price="x", processes=ranks)
    )
    engine.setup(nn.Linear(3, 3), adamw(ADAM), schedule(ADAM, what.steps))
    sampler = BucketSampler({CELL: IDS}, {CELL: 2}, what.seed, engine.data_rank, engine.data_size)
    stream = BatchStream(sampler, load if precision == "fp32" else load_half)
    with stream, stop_asked(what.out) as asked:
        aids = Aids(log or RunLog(), Meter(1e9, ranks), look, asked=asked)
        with Trainer(engine, objective or Noisy(), stream, what, aids) as trainer:
            trainer.fit()
    return trainer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a run."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [4, 7])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, killed_at: int, precision: str) -> None:
    """Killed between checkpoints: steps since the last one are made again, and all ends bit for bit equal."""

    def die(call: int) -> None:
        if call == 2 * killed_at:
            raise KeyboardInterrupt

    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = run(plan(tmp_path / "straight"), precision=precision)
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "killed"), Noisy(die), precision)
    again = Noisy()
    resumed = run(plan(tmp_path / "killed"), again, precision)
    assert again.calls == 2 * (9 - (killed_at - 1) // 3 * 3)
    for name, weight in straight.weights().items():
        assert torch.equal(weight, resumed.weights()[name])
        assert torch.equal(straight.engine.masters()[name], resumed.engine.masters()[name])
    ledgers = [read(tmp_path / name / "consumed") for name in ("straight", "killed")]
    assert ledgers[0].equals(ledgers[1])
    assert problems(ledgers[1], steps=9, epoch_length=EPOCH) == []
    logs = [read_log(tmp_path / name / "loss.csv") for name in ("straight", "killed")]
    for column in ("step", "loss", "lr", "grad_norm", "examples", "bucket"):
        assert logs[0][column].tolist() == logs[1][column].tolist()


def test_what_an_objective_keeps_is_resumed_exactly_too(tmp_path: Path) -> None:
    """Killed in step 7, after the checkpoint of step 6: its state is that of step 6, not what the killed run had."""

    def die(call: int) -> None:
        if call == 14:
            raise KeyboardInterrupt

    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight, resumed = Remembering(), Remembering()
    wanted = run(plan(tmp_path / "straight"), straight)
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "killed"), Remembering(die))
    found = run(plan(tmp_path / "killed"), resumed)
    assert straight.begun == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert resumed.begun == [7, 8, 9]
    assert torch.equal(resumed.seen, straight.seen)
    assert all(torch.equal(found.weights()[name], weight) for name, weight in wanted.weights().items())
    logs = [read_log(tmp_path / name / "loss.csv")["loss"].tolist() for name in ("straight", "killed")]
    assert logs[0] == logs[1]


def test_terms_of_a_loss_are_logged_beside_it(out: Path) -> None:
    class Kept(RunLog):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def metrics(self, values: Any, step: int | None = None) -> None:
            self.rows.append(dict(values))

    log, objective = Kept(), Remembering()
    run(plan(out), objective, log=log)
    assert len(log.rows) == 9
    assert all({"loss", "lr", "grad_norm", "loss_seen"} <= row.keys() for row in log.rows)
    # The mean over the step's two micro-batches of a growing sum: the second is where the step ends.
    assert log.rows[-1]["loss_seen"] < float(objective.seen)


def test_a_finished_run_has_nothing_left_to_do(out: Path) -> None:
    first, again = run(plan(out)), Noisy()
    second = run(plan(out), again)
    assert again.calls == 0
    assert all(torch.equal(second.weights()[name], weight) for name, weight in first.weights().items())


def test_weights_are_the_average_where_there_is_one(out: Path, tmp_path: Path) -> None:
    averaged = run(plan(out))
    assert averaged.ema is not None
    assert torch.equal(averaged.weights()["weight"], averaged.ema.shards["weight"])
    assert not torch.equal(averaged.weights()["weight"], averaged.engine.masters()["weight"])
    (tmp_path / "raw").mkdir()
    raw = run(plan(tmp_path / "raw", ema_decay=None))
    assert torch.equal(raw.weights()["weight"], raw.engine.masters()["weight"])


def test_every_step_is_logged(out: Path) -> None:
    run(plan(out))
    rows = read_log(out / "loss.csv")
    assert rows["step"].tolist() == list(range(1, 10))
    assert rows["lr"].tolist() == pytest.approx([0.0025, 0.005, 0.0075, *[0.01] * 6])
    assert rows["tokens"].tolist() == [10 * n for n in rows["examples"]]
    assert rows["examples"].sum() == sum(counts(read(out / "consumed")).values())
    assert ((rows["data_wait_share"] >= 0) & (rows["data_wait_share"] <= 1)).all()
    assert (rows["grad_norm"] > 0).all()
    assert rows["bucket"][0] == "48x80/48x80/5+48x80/48x80/5"


class Spoiled(Noisy):
    """From step `first` on, losses of the batches that hold a clip are multiplied: nan and inf are not finite."""

    def __init__(self, clips: set[int], factor: float, first: int = 1) -> None:
        super().__init__()
        self.clips, self.factor, self.first, self.step = clips, factor, first, 0

    def begin(self, step: int) -> None:
        self.step = step

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        loss = super().loss(engine, data, generator)
        spoiled = self.clips & {int(value) for value in data[:, 0].tolist()}
        return replace(loss, value=loss.value * self.factor) if spoiled and self.step >= self.first else loss


class Cursed(Noisy):
    """From step `first` on, the loss of one batch is multiplied, whenever that batch comes."""

    def __init__(self, first: int, factor: float) -> None:
        super().__init__()
        self.first, self.factor, self.step = first, factor, 0
        self.batch: Tensor | None = None

    def begin(self, step: int) -> None:
        self.step = step

    def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
        loss = super().loss(engine, data, generator)
        if self.batch is None and self.step == self.first:
            self.batch = data
        hit = self.batch is not None and torch.equal(data, self.batch)
        return replace(loss, value=loss.value * self.factor) if hit else loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_teaches_nothing_and_is_on_record(out: Path, bad: float) -> None:
    """One clip of seven is broken; a step that meets it makes no update, and patience is never used up."""
    trainer = run(plan(out, guard=Guard(patience=9)), Spoiled({3}, bad))
    assert all(torch.isfinite(weight).all() for weight in trainer.weights().values())
    rows, losses = read(out / "consumed"), read_log(out / "loss.csv")
    unused = rows[~rows["used"]]
    assert 0 < len(unused) < len(rows)
    assert set(unused["reason"]) == {"loss or gradient not finite"}
    hit = {row.step for row in rows.itertuples() if "clip3" in row.ids}
    assert set(unused["step"]) == hit == set(losses[~losses["loss"].map(math.isfinite)]["step"])


def steps_saved(out: Path) -> list[int]:
    """Steps whose checkpoints are there."""
    return sorted(int(place.name.removeprefix("step-")) for place in (out / "checkpoints").glob("step-*"))


def test_what_training_may_go_back_to_is_saved_after_a_good_step(out: Path) -> None:
    """Steps 3 and 4 are spoiled: the checkpoint of step 3 is made after step 5."""

    class Twice(Noisy):
        def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
            loss = super().loss(engine, data, generator)
            return replace(loss, value=loss.value * math.nan) if self.calls in (5, 8) else loss

    run(plan(out, guard=Guard(patience=9), keep_checkpoints=9), Twice())
    assert steps_saved(out) == [5, 6, 9]


def test_asked_to_stop_or_at_its_end_training_saves_in_any_case(out: Path) -> None:
    def ask(call: int) -> None:
        if call == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    class Bad(Noisy):
        def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
            return replace(super().loss(engine, data, generator), value=engine.model(data).sum() * math.nan)

    what = plan(out, guard=Guard(patience=99), keep_checkpoints=9)
    with pytest.raises(Preempted, match="saved step 4"):
        run(what, Bad(ask))
    run(what, Bad())
    assert steps_saved(out) == [4, 9]


class Looks:
    """Writes down when it was asked to look."""

    def __init__(self) -> None:
        self.after, self.resumed_at = list[int](), list[int]()

    def __call__(self, step: int, training: Trainer) -> None:
        self.after.append(step)

    def resumed(self, step: int, training: Trainer) -> None:
        self.resumed_at.append(step)


def test_a_look_that_a_stop_cut_off_is_asked_for_again(out: Path) -> None:
    def ask(call: int) -> None:
        if call == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    first, second = Looks(), Looks()
    with pytest.raises(Preempted):
        run(plan(out), Noisy(ask), look=first)
    run(plan(out), look=second)
    assert (first.after, first.resumed_at) == ([1, 2, 3], [])
    assert (second.after, second.resumed_at) == ([5, 6, 7, 8, 9], [4])


def test_steps_that_stay_wrong_send_training_back_past_their_batches(out: Path) -> None:
    """From step 5 on, one batch is spoiled: training goes back to step 3 and never meets that batch again."""
    trainer = run(plan(out, guard=Guard(patience=1), steps=12), Cursed(5, float("nan")))
    rows = read(out / "consumed")
    passed = rows[rows["reason"].str.contains("went wrong")]
    assert len(passed) > 0
    assert not passed["used"].any()
    assert rows[rows["used"]]["step"].max() == 12
    assert problems(rows, steps=12, epoch_length=EPOCH) == []
    assert read_log(out / "loss.csv")["step"].tolist() == list(range(1, 13))
    assert trainer.aids.meter.goodput() < 1


def test_a_spike_sends_training_back_too(out: Path) -> None:
    run(plan(out, guard=Guard(spike=50.0, window=4)), Cursed(6, 1e5))
    rows = read(out / "consumed")
    assert rows["reason"].str.contains("went wrong").any()
    assert read_log(out / "loss.csv")["loss"].max() < 1e3


def test_too_many_wrong_turns_stop_training(out: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"step \d, on examples clip\d.*optimizer\.lr"):
        run(plan(out, guard=Guard(patience=1, rollbacks=1), steps=12), Spoiled(set(range(7)), float("nan"), first=4))
    assert (out / "checkpoints" / "step-00000003").is_dir()


def test_a_start_that_goes_wrong_has_nothing_to_go_back_to(out: Path) -> None:
    with pytest.raises(TrainingDiverged, match="before the first checkpoint"):
        run(plan(out, guard=Guard(patience=1)), Spoiled(set(range(7)), float("nan")))


def test_sigterm_saves_and_stops_and_the_rest_follows_exactly(out: Path, tmp_path: Path) -> None:
    def ask(call: int) -> None:
        if call == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved step 4 of 9"):
        run(plan(out), Noisy(ask))
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = run(plan(out))
    (tmp_path / "straight").mkdir()
    straight = run(plan(tmp_path / "straight"))
    assert all(torch.equal(resumed.weights()[name], weight) for name, weight in straight.weights().items())


def test_what_does_not_fit_is_named_with_its_micro_batch_and_what_would_help(out: Path) -> None:
    def ask(call: int) -> None:
        torch.empty(2**50 if call == 4 else 1)  # 4 PiB are more than an address space

    with pytest.raises(OutOfMemory, match=r"bucket 48x80/48x80/5 does not fit: micro-batch 2 of 2, of shape \[\d, 3\]"):
        run(plan(out), Noisy(ask))


def test_another_recipes_checkpoints_stop_the_run(out: Path) -> None:
    run(plan(out))
    with pytest.raises(CheckpointMismatch, match=r"aaaa.*bbbb"):
        run(plan(out, identity=Identity("v2_0-tiny", "stage1", "bbbb")))
