import json
import logging
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.engines.make import make_engine
from ml.engines.protocol import Engine
from ml.methods import Engine as EngineSection
from ml.models.weights import CheckpointMismatch
from ml.sections import Adam, Compute
from ml.training.checkpoint import CheckpointError, CheckpointStore, Identity, Parts, Progress, verify
from ml.training.ema import EMA
from ml.training.optim import adamw, schedule
from ml.training.tensor_files import write

Ranks = Callable[..., list[Any]]
ADAM = Adam(lr=0.1, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=8)
WHO = Identity("v2_0-tiny", "stage1", "aaaa")
FILES = [f"{kind}-00000-of-00001.safetensors" for kind in ("average", "masters", "moments", "random")]


class Net(nn.Module):
    """Blocks of odd sizes, and a weight that never has a gradient."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.unused = nn.Linear(3, 7), nn.Parameter(torch.randn(5))
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Counter:
    """An objective that keeps a number between steps."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def save(self, folder: Path) -> None:
        (folder / "count.json").write_text(json.dumps(self.count), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self.count = json.loads((folder / "count.json").read_text(encoding="utf-8"))


def parts(seed: int = 0, count: int = 1, ema: bool = True, counter: int = 0, **section: Any) -> Parts:
    given = {"kind": "plain", "precision": "fp32", "grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1}
    made = make_engine(
        EngineSection.model_validate({**given, "checkpoint_blocks": (0, 0), **section}),
        Compute(accelerators="CPU:1", nodes=1, price="x", processes=count),
    )
    made.setup(Net(seed), adamw(ADAM), schedule(ADAM, 100))
    return Parts(made, EMA(made.masters(), 0.5) if ema else None, Counter(counter))


def train(run: Parts, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + run.engine.data_rank)
    with run.engine.accumulate(last=True):
        run.engine.backward(run.engine.model(torch.randn(4, 3, generator=generator)).square().mean())
    run.engine.step()
    if run.ema:
        run.ema.update(run.engine.masters())


def everything(run: Parts) -> dict[str, Any]:
    """All that a checkpoint brings back, full, on the main rank."""
    engine, moments = run.engine, run.engine.moments()
    return {
        "masters": engine.gather(engine.masters()),
        "mean": engine.gather(moments.mean),
        "square": engine.gather(moments.square),
        "average": engine.gather(run.ema.shards) if run.ema else {},
        "updates": dict(moments.updates),
        "lr": engine.learning_rate(),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for kind, value in one.items():
        if not isinstance(value, dict) or kind == "updates":
            assert value == other[kind], kind
            continue
        assert value.keys() == other[kind].keys(), kind
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in value.items()), kind


def progress(step: int) -> Progress:
    where = {"seed": 7, "epoch": step // 3, "index": step % 3, "skipped": [[9, 1]], "order": "abcd"}
    return Progress(step, where, {"00000001-00000002.parquet": "0" * 64})


def store_of(folder: Path, engine: Engine, keep: int = 2, patience: float = 60.0) -> CheckpointStore:
    return CheckpointStore(folder, WHO, keep, engine, patience)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointStore, Parts]:
    """A store with checkpoints of steps 1, 2 and 3, of which two are kept; for reading only."""
    run = parts(counter=30)
    store = store_of(tmp_path_factory.mktemp("kept"), run.engine)
    for step in (1, 2, 3):
        train(run, step)
        store.save(run, progress(step))
    store.wait()
    return store, run


def test_everything_comes_back_bit_for_bit_and_goes_on_so(tmp_path: Path) -> None:
    store = store_of(tmp_path, (run := parts(counter=30)).engine)
    for step in (1, 2, 3):
        train(run, step)
    store.save(run, progress(3))
    place = store.newest()
    assert place is not None
    other = parts(seed=5)
    assert store.load(place, other) == progress(3)
    assert isinstance(other.objective, Counter)
    assert other.objective.count == 30
    assert_same(everything(run), everything(other))
    assert run.engine.moments().updates == dict.fromkeys((n for n in run.engine.masters() if n != "unused"), 3)
    train(run, 4)
    train(other, 4)
    assert_same(everything(run), everything(other))


def test_the_generators_of_a_rank_come_back(tmp_path: Path) -> None:
    run = parts()
    store = store_of(tmp_path, run.engine)
    torch.manual_seed(11)
    store.save(run, progress(1))
    store.wait()
    wanted = torch.rand(3)
    torch.manual_seed(12)
    store.load(tmp_path / "step-00000001", run)
    assert torch.equal(torch.rand(3), wanted)


def test_only_the_newest_are_kept_and_nothing_half_written_shows(kept: tuple[CheckpointStore, Parts]) -> None:
    folder = kept[0].folder
    assert names(folder) == ["step-00000002", "step-00000003"]
    assert names(folder / "step-00000003") == [*FILES[:3], "objective", FILES[3], "state.json"]
    assert set(verify(folder / "step-00000003")["files"]) == {*FILES, "objective/count.json"}


@pytest.mark.parametrize("harm", ["flip", "truncate", "lose"])
@pytest.mark.parametrize("file", [*FILES, "objective/count.json", "state.json"])
def test_a_harmed_file_sends_us_to_the_checkpoint_before(
    kept: tuple[CheckpointStore, Parts], tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(kept[0].folder, tmp_path / "checkpoints")
    path = folder / "step-00000003" / file
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    (folder / "step-00000004.partial").mkdir()
    (folder / "step-00000005").mkdir()
    with caplog.at_level(logging.WARNING):
        assert store_of(folder, kept[1].engine).newest() == folder / "step-00000002"
    assert "step-00000003" in caplog.text
    with pytest.raises(CheckpointError, match=Path(file).name):
        verify(folder / "step-00000003")


def test_a_broken_branch_beyond_never_pushes_out_what_was_just_saved(tmp_path: Path) -> None:
    run = parts()
    store = store_of(tmp_path, run.engine, keep=1)
    store.save(run, progress(100))
    store.wait()
    (tmp_path / "step-00000117").mkdir()
    (tmp_path / "step-00000117" / "state.json").write_text("{", encoding="utf-8")
    assert store.newest() == tmp_path / "step-00000100"
    store.save(run, progress(110))
    assert store.newest() == tmp_path / "step-00000110"
    assert names(tmp_path) == ["step-00000110"]
    store.save(run, progress(110))  # a step can be saved again
    assert store.newest() == tmp_path / "step-00000110"


def test_a_run_without_average_keeps_none(tmp_path: Path) -> None:
    store = store_of(tmp_path, (run := parts(ema=False)).engine)
    store.save(run, progress(1))
    store.wait()
    assert not list(tmp_path.rglob("average-*"))
    assert store.load(tmp_path / "step-00000001", parts(3, ema=False)).step == 1


# --- written behind -----------------------------------------------------------------------------------------------


def hold_writers(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written until the event is set."""
    go = threading.Event()

    def held(path: Path, tensors: dict[str, Tensor]) -> str:
        assert go.wait(timeout=60)
        return write(path, tensors)

    monkeypatch.setattr("ml.training.checkpoint.write", held)
    return go


def test_save_returns_before_anything_is_written_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, run = hold_writers(monkeypatch), parts()
    store = store_of(tmp_path, run.engine)
    train(run, 1)
    wanted = everything(run)
    store.save(run, progress(1))
    assert names(tmp_path) == ["step-00000001.partial"]
    assert names(tmp_path / "step-00000001.partial") == ["objective"]
    train(run, 2)
    go.set()
    store.wait()
    other = parts(seed=5)
    store.load(tmp_path / "step-00000001", other)
    assert_same(everything(other), wanted)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, run = hold_writers(monkeypatch), parts()
    store = store_of(tmp_path, run.engine)
    store.save(run, progress(1))
    second = threading.Thread(target=store.save, args=(run, progress(2)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert names(tmp_path) == ["step-00000001.partial"]
    go.set()
    second.join(60)
    assert "step-00000001" in names(tmp_path)
    store.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


# --- when it cannot be written ------------------------------------------------------------------------------------


def fill_disk(folder: Path) -> dict[str, Any]:
    """Steps 1 to 4; the kernel lets no file grow beyond 300 bytes while 2 and 4 are saved."""
    run = parts()
    store, limits, seen = store_of(folder, run.engine), resource.getrlimit(resource.RLIMIT_FSIZE), {}
    for step in (1, 2, 3, 4):
        train(run, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if step % 2 == 0 else limits[0], limits[1]))
        store.save(run, progress(step))
        store.close()
        seen[step] = names(folder)
    with pytest.raises(CheckpointError, match="File too large"):
        store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"seen": seen, "failures": store.failures, "newest": store.newest()}


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path, ranks: Ranks) -> None:
    found = ranks(fill_disk, tmp_path, count=1)[0]
    one, three = "step-00000001", "step-00000003"
    assert found["seen"] == {1: [one], 2: [one], 3: [one, three], 4: [one, three]}
    assert found["failures"] == 2
    assert found["newest"] == tmp_path / three


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints").write_text("a file", encoding="utf-8")
    run = parts()
    store = store_of(tmp_path / "checkpoints", run.engine)
    with caplog.at_level(logging.WARNING):
        store.save(run, progress(1))
    assert "step-00000001 was not saved" in caplog.text
    assert store.failures == 1
    with pytest.raises(CheckpointError, match="checkpoints"):
        store.wait()


def test_no_checkpoint_is_made_that_its_ledger_does_not_lead_up_to(tmp_path: Path) -> None:
    run = parts()
    store = store_of(tmp_path / "new", run.engine)
    assert store.newest() is None
    store.save(run, Progress(1, {}, None))
    with pytest.raises(CheckpointError, match="ledger of consumed examples could not be written"):
        store.wait()
    assert names(tmp_path) == []
    assert store.newest() is None


# --- several ranks ------------------------------------------------------------------------------------------------


def save_on_ranks(folder: Path, count: int, section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    run = parts(count=count, counter=5, **section)
    store = store_of(folder, run.engine)
    for step in (1, 2):
        train(run, step)
    store.save(run, progress(2))
    store.wait()
    return everything(run), names(folder / "step-00000002")


def load_on_ranks(folder: Path, count: int, section: dict[str, Any]) -> tuple[dict[str, Any], Progress]:
    run = parts(seed=5, count=count, **section)
    store = store_of(folder, run.engine)
    place = store.newest()
    assert place is not None
    where = store.load(place, run)
    return everything(run), where


def on(ranks: Ranks, function: Any, folder: Path, count: int, section: dict[str, Any]) -> Any:
    """What the main rank gives."""
    return ranks(function, folder, count, section, count=count)[0] if count > 1 else function(folder, 1, section)


FULL, ZERO = {"sharding": "full"}, {"kind": "colossal", "sharding": "zero2"}


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        pytest.param((2, {}), (1, {}), id="ddp2-1"),
        pytest.param((1, {}), (2, FULL), id="1-fsdp2"),
        pytest.param((3, FULL), (2, {}), id="fsdp3-ddp2"),
        pytest.param((2, ZERO), (1, {}), id="zero2-1"),
        pytest.param((2, FULL), (2, ZERO), id="fsdp2-zero2"),
    ],
)
def test_any_ranks_take_back_what_others_saved(tmp_path: Path, ranks: Ranks, saver: Any, loader: Any) -> None:
    wanted, files = on(ranks, save_on_ranks, tmp_path, *saver)
    assert sum(name.startswith("masters-") for name in files) == saver[0]
    found, where = on(ranks, load_on_ranks, tmp_path, *loader)
    assert where == progress(2)
    assert_same(found, wanted)


def fail_on_one(folder: Path, how: str) -> tuple[int, str, list[str]]:
    """Rank 1 of 2 cannot write step 2: its disk is full, or it is killed while it writes."""
    run = parts(count=2)
    store = store_of(folder, run.engine, patience=5.0 if how == "killed" else 60.0)
    store.save(run, progress(1))
    store.wait()
    if run.engine.rank == 1 and how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if run.engine.rank == 1 and how == "killed":
        pytest.MonkeyPatch().setattr("ml.training.checkpoint.write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    store.save(run, progress(2))
    if how == "killed":
        store.close()
        assert names(folder) == ["step-00000001"]
        return 0, "", []
    with pytest.raises(CheckpointError) as error:
        store.wait()
    return store.failures, str(error.value), names(folder)


def test_all_ranks_know_that_one_could_not_write(tmp_path: Path, ranks: Ranks) -> None:
    said = ranks(fail_on_one, tmp_path, "full")
    assert said[0] == said[1] == (1, said[0][1], ["step-00000001"])
    assert "rank 1 could not write" in said[0][1]


def test_a_rank_that_dies_while_it_writes_leaves_no_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    assert ranks(fail_on_one, tmp_path, "killed", expect_death=True)[1] == -signal.SIGKILL
    assert names(tmp_path) == ["step-00000001"]


def refuse(folder: Path) -> str:
    store = CheckpointStore(folder, Identity("v1_0", "stage1", "cccc"), 2, parts(count=2).engine)
    with pytest.raises(CheckpointMismatch) as error:
        store.newest()
    return str(error.value)


def test_all_ranks_refuse_another_recipes_checkpoints(kept: tuple[CheckpointStore, Parts], ranks: Ranks) -> None:
    said = ranks(refuse, kept[0].folder)
    assert said[0] == said[1]
    assert "belongs to v2_0-tiny/stage1 (aaaa), this run is v1_0/stage1 (cccc)" in said[0]
