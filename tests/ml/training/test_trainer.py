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
from ml.batching.sampler import Batch, BatchStream, BucketSampler
from ml.engines.plain import PlainEngine
from ml.models.weights import CheckpointMismatch
from ml.sections import Adam
from ml.shapes import Size
from ml.training.checkpoint import Identity
from ml.training.curves import read_log
from ml.training.optim import adamw, schedule
from ml.training.step import Loss, Objective
from ml.training.trainer import Plan, Preempted, Trainer, TrainingDiverged

ADAM = Adam(lr=0.01, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=3)
CELL = Cell("48x80", 5, Size(48, 80))
IDS = [f"clip{i}" for i in range(7)]


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


def plan(out: Path, **over: Any) -> Plan:
    base = Plan(
        out=out,
        identity=Identity("v2_0-tiny", "stage1", "aaaa"),
        seed=5,
        steps=9,
        accumulate=2,
        checkpoint_every=3,
        keep_checkpoints=2,
        ema_decay=0.8,
    )
    return replace(base, **over)


def run(what: Plan, objective: Any = None, dtype: torch.dtype = torch.float32) -> Trainer:
    torch.manual_seed(0)
    engine = PlainEngine(torch.device("cpu"), dtype, 1.0)
    engine.setup(nn.Linear(3, 3), adamw(ADAM), schedule(ADAM, what.steps))
    sampler = BucketSampler({CELL: IDS}, {CELL: 2}, what.seed)
    with BatchStream(sampler, lambda batch: load(batch).to(dtype)) as stream:
        trainer = Trainer(engine, objective or Noisy(), stream, what, RunLog())
        trainer.fit()
    return trainer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a run."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("killed_at", [4, 7])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, killed_at: int, dtype: torch.dtype) -> None:
    """Killed between checkpoints: steps since the last one are made again, and all ends bit for bit equal."""

    def die(call: int) -> None:
        if call == 2 * killed_at:
            raise KeyboardInterrupt

    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    straight = run(plan(tmp_path / "straight"), dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "killed"), Noisy(die), dtype)
    again = Noisy()
    resumed = run(plan(tmp_path / "killed"), again, dtype)
    assert again.calls == 2 * (9 - (killed_at - 1) // 3 * 3)
    for name, weight in straight.weights().items():
        assert torch.equal(weight, resumed.weights()[name])
        assert torch.equal(straight.engine.masters()[name], resumed.engine.masters()[name])
    assert resumed.stream.consumed == straight.stream.consumed
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
    torch.manual_seed(0)
    engine = PlainEngine(torch.device("cpu"), torch.float32, 1.0)
    engine.setup(nn.Linear(3, 3), adamw(ADAM), schedule(ADAM, 9))
    with BatchStream(BucketSampler({CELL: IDS}, {CELL: 2}, 5), load) as stream:
        Trainer(engine, objective, stream, plan(out), log).fit()
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
    trainer = run(plan(out))
    rows = read_log(out / "loss.csv")
    assert rows["step"].tolist() == list(range(1, 10))
    assert rows["lr"].tolist() == pytest.approx([0.0025, 0.005, 0.0075, *[0.01] * 6])
    assert rows["tokens"].tolist() == [10 * n for n in rows["examples"]]
    assert rows["examples"].sum() == sum(trainer.stream.consumed.values())
    assert ((rows["data_wait_share"] >= 0) & (rows["data_wait_share"] <= 1)).all()
    assert (rows["grad_norm"] > 0).all()
    assert rows["bucket"][0] == "48x80/48x80/5+48x80/48x80/5"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_examples(out: Path, bad: float) -> None:
    class Broken(Noisy):
        def loss(self, engine: Any, data: Tensor, generator: torch.Generator) -> Loss:
            loss = super().loss(engine, data, generator)
            return replace(loss, value=loss.value * bad) if self.calls == 9 else loss

    with pytest.raises(TrainingDiverged, match=r"step 5: loss (nan|inf).*on examples clip\d, clip\d") as raised:
        run(plan(out), Broken())
    assert "lower the learning rate" in str(raised.value)
    assert (out / "checkpoints" / "step-00000003").is_dir()
    assert not (out / "checkpoints" / "step-00000006").exists()


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


def test_another_recipes_checkpoints_stop_the_run(out: Path) -> None:
    run(plan(out))
    with pytest.raises(CheckpointMismatch, match=r"aaaa.*bbbb"):
        run(plan(out, identity=Identity("v2_0-tiny", "stage1", "bbbb")))
