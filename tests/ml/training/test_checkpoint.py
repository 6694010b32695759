import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ml.engines.plain import PlainEngine
from ml.models.weights import CheckpointMismatch
from ml.sections import Adam
from ml.training.checkpoint import CheckpointError, CheckpointStore, Identity, Parts, Progress, verify
from ml.training.ema import EMA
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=0.1, eps=1e-8, betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=0)
WHO = Identity("v2_0-tiny", "stage1", "aaaa")


def engine(seed: int = 0) -> PlainEngine:
    torch.manual_seed(seed)
    made = PlainEngine(torch.device("cpu"), torch.float32, 1.0)
    made.setup(nn.Linear(3, 2), adamw(ADAM), schedule(ADAM, 100))
    return made


class Counter:
    """An objective that keeps a number between steps."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def save(self, folder: Path) -> None:
        (folder / "count.json").write_text(json.dumps(self.count), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self.count = json.loads((folder / "count.json").read_text(encoding="utf-8"))


class Forgetful(Counter):
    """An objective that keeps nothing."""

    def save(self, folder: Path) -> None:
        return

    def load(self, folder: Path) -> None:
        return


def advance(made: PlainEngine, ema: EMA) -> None:
    made.backward(made.model(torch.ones(1, 3)).square().sum())
    made.step()
    ema.update(made.masters())


def progress(step: int) -> Progress:
    return Progress(step, {"seed": 7, "epoch": step // 3, "index": step % 3}, {"clip1": step, "clip2": 1})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CheckpointStore, PlainEngine, EMA]:
    """A store with checkpoints of steps 1, 2 and 3, of which two are kept."""
    store, made = CheckpointStore(tmp_path / "checkpoints", WHO, keep=2), engine()
    ema = EMA(made.masters(), 0.5)
    for step in (1, 2, 3):
        advance(made, ema)
        store.save(Parts(made, ema, Counter(10 * step)), progress(step))
    return store, made, ema


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_everything_comes_back(saved: tuple[CheckpointStore, PlainEngine, EMA]) -> None:
    store, made, ema = saved
    place = store.newest()
    assert place is not None
    other = engine(seed=5)
    average = EMA(other.masters(), 0.5)
    counter = Counter()
    assert store.load(place, Parts(other, average, counter)) == progress(3)
    assert counter.count == 30
    advance(made, ema)
    advance(other, average)
    for name in made.masters():
        assert torch.equal(made.masters()[name], other.masters()[name])
        assert torch.equal(ema.shards[name], average.shards[name])


def test_only_the_newest_are_kept_and_nothing_half_written_shows(
    saved: tuple[CheckpointStore, PlainEngine, EMA],
) -> None:
    store, _, _ = saved
    assert names(store) == ["step-00000002", "step-00000003"]
    assert sorted(
        p.relative_to(store.folder / "step-00000003").as_posix() for p in store.folder.rglob("step-*3/**/*")
    ) == [
        "consumed.json",
        "ema.safetensors",
        "master.safetensors",
        "objective",
        "objective/count.json",
        "optimizer",
        "optimizer/state.pt",
        "scheduler.pt",
        "state.json",
    ]


@pytest.mark.parametrize(
    "file",
    [
        *("master.safetensors", "ema.safetensors", "optimizer/state.pt", "objective/count.json"),
        *("consumed.json", "state.json"),
    ],
)
def test_one_flipped_byte_sends_us_to_the_checkpoint_before(
    saved: tuple[CheckpointStore, PlainEngine, EMA], file: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, _, _ = saved
    path = store.folder / "step-00000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        place = store.newest()
    assert place == store.folder / "step-00000002"
    assert "step-00000003" in caplog.text
    with pytest.raises(CheckpointError):
        verify(store.folder / "step-00000003")


def test_a_checkpoint_cut_short_is_passed_over(saved: tuple[CheckpointStore, PlainEngine, EMA]) -> None:
    store, _, _ = saved
    (store.folder / "step-00000003" / "master.safetensors").unlink()
    (store.folder / "step-00000004.partial").mkdir()
    (store.folder / "step-00000005").mkdir()
    assert store.newest() == store.folder / "step-00000002"
    with pytest.raises(CheckpointError, match=r"lacks master.safetensors"):
        verify(store.folder / "step-00000003")


def test_a_broken_branch_beyond_never_pushes_out_what_was_just_saved(tmp_path: Path) -> None:
    store, made = CheckpointStore(tmp_path, WHO, keep=1), Parts(engine(), None, Forgetful())
    store.save(made, progress(100))
    broken = tmp_path / "step-00000117"
    broken.mkdir()
    (broken / "state.json").write_text("{", encoding="utf-8")
    assert store.newest() == tmp_path / "step-00000100"
    store.save(made, progress(110))
    assert names(store) == ["step-00000110"]
    place = store.newest()
    assert place is not None
    assert store.load(place, Parts(engine(3), None, Forgetful())) == progress(110)


def test_another_recipes_checkpoints_are_refused_by_name(saved: tuple[CheckpointStore, PlainEngine, EMA]) -> None:
    store, _, _ = saved
    other = CheckpointStore(store.folder, Identity("v2_0-tiny", "stage1", "bbbb"), keep=2)
    with pytest.raises(CheckpointMismatch, match=r"v2_0-tiny/stage1 \(aaaa\), this run is v2_0-tiny/stage1 \(bbbb\)"):
        other.newest()


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", WHO, keep=1).newest() is None


def test_a_run_without_average_keeps_none(tmp_path: Path) -> None:
    store, made = CheckpointStore(tmp_path, WHO, keep=1), engine()
    place = store.save(Parts(made, None, Forgetful()), progress(1))
    assert "ema.safetensors" not in json.loads((place / "state.json").read_text(encoding="utf-8"))["files"]
    assert store.load(place, Parts(engine(3), None, Forgetful())).step == 1


def test_an_objective_that_keeps_nothing_leaves_an_empty_folder(tmp_path: Path) -> None:
    place = CheckpointStore(tmp_path, WHO, keep=1).save(Parts(engine(), None, Forgetful()), progress(1))
    assert list((place / "objective").iterdir()) == []
    verify(place)


def test_an_objective_that_fails_to_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    class Full(Counter):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise OSError("no space left")

    store = CheckpointStore(tmp_path, WHO, keep=1)
    store.save(Parts(engine(), None, Counter()), progress(1))
    with pytest.raises(OSError, match="no space left"):
        store.save(Parts(engine(), None, Full()), progress(2))
    assert store.newest() == tmp_path / "step-00000001"
