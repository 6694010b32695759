import logging
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from infra.storage import sha256_of
from ml.batching.buckets import Cell
from ml.batching.sampler import Batch, BucketSampler, Position
from ml.engines.plain import PlainEngine
from ml.engines.world import World
from ml.methods import Engine as EngineSection
from ml.shapes import Size
from ml.training.consumed import SCHEMA, Ledger, counts, facts, problems, read

Ranks = Callable[..., list[Any]]
CELL = Cell("64px", 5, Size(48, 80))
IDS = [f"clip{i}" for i in range(11)]
LENGTH = 6  # batches of two


def engine(sequence_parallel: int = 1) -> PlainEngine:
    section = EngineSection(
        kind="plain",
        precision="fp32",
        grad_clip=1.0,
        accumulate=1,
        sequence_parallel=sequence_parallel,
        checkpoint_blocks=(0, 0),
    )
    cpu = torch.device("cpu")
    return PlainEngine(cpu, torch.float32, 1.0, World.join(section, cpu))


def take(ledger: Ledger, state: dict[str, Any], steps: range, accumulate: int = 1) -> dict[str, Any]:
    """Note what each step takes from a state on, and return the state after it."""
    source = BucketSampler({CELL: IDS}, {CELL: 2}, 0, ledger.engine.data_rank, ledger.engine.data_size)
    position = source.restore(state)
    for step in steps:
        batches = []
        for _ in range(accumulate):
            batch, position = source.at(position)
            batches.append(batch)
        ledger.add(step, batches)
    return source.state(position)


def start() -> dict[str, Any]:
    return BucketSampler({CELL: IDS}, {CELL: 2}, 0).state(Position())


def order(count: int) -> list[Batch]:
    source, position, batches = BucketSampler({CELL: IDS}, {CELL: 2}, 0), Position(), []
    for _ in range(count):
        batch, position = source.at(position)
        batches.append(batch)
    return batches


def places(folder: Path) -> list[tuple[int, int]]:
    rows = read(folder)
    return list(zip(rows["epoch"], rows["index"], strict=True))


@pytest.fixture
def straight(tmp_path: Path) -> pd.DataFrame:
    """Eight steps of two batches, in two files."""
    ledger = Ledger(tmp_path / "straight", engine())
    state = take(ledger, start(), range(1, 6), accumulate=2)
    ledger.flush(5)
    take(ledger, state, range(6, 9), accumulate=2)
    ledger.flush(8)
    return read(tmp_path / "straight")


def test_a_ledger_says_which_batch_each_step_took(straight: pd.DataFrame, tmp_path: Path) -> None:
    wanted = order(16)
    assert list(straight["step"]) == [step for step in range(1, 9) for _ in range(2)]
    assert list(straight["micro"]) == [0, 1] * 8
    assert [tuple(ids) for ids in straight["ids"]] == [batch.ids for batch in wanted]
    assert [Position(*place) for place in places(tmp_path / "straight")] == [batch.position for batch in wanted]
    assert set(straight["cell"]) == {str(CELL)}
    assert problems(straight, steps=8, epoch_length=LENGTH) == []
    assert counts(straight) == Counter(name for batch in wanted for name in batch.ids)
    assert facts(straight) == {"examples_seen": 11, "epochs": 3, "batches_unused": 0, "ledger_problems": []}


def test_files_are_given_with_their_digests(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, engine())
    state = take(ledger, start(), range(1, 3))
    assert set(ledger.flush(2) or {}) == {"00000001-00000002.parquet"}
    take(ledger, state, range(3, 5))
    assert ledger.flush(4) == {path.name: sha256_of(path) for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_ledger_can_be_read(tmp_path: Path) -> None:
    rows = read(tmp_path / "none")
    assert list(rows.columns) == SCHEMA.names
    assert problems(rows) == []
    assert problems(rows, steps=3) == ["no batch was noted"]
    assert counts(rows) == {}
    assert facts(rows)["examples_seen"] == 0


def test_every_fault_is_found(straight: pd.DataFrame) -> None:
    """A batch left out, one taken again, two exchanged, an example in two batches, steps that are not there."""
    out = straight.drop(index=3)
    assert problems(out) == ["batches never taken (epoch, index): (0, 3)"]
    assert problems(straight.iloc[2:]) == [
        "steps without a batch: 1",
        "batches never taken (epoch, index): (0, 0), (0, 1)",
    ]
    again = pd.concat([straight, straight.iloc[[3]].assign(step=9)])
    assert problems(again)[0] == "batches taken again (epoch, index): (0, 3) in step 9"
    exchanged = straight.assign(step=[*straight["step"][:-4], 8, 8, 7, 7])
    assert problems(exchanged) == ["batches taken later than their turn (epoch, index): (2, 0) in step 8"]
    ids = [straight["ids"][0 if index == 4 else index] for index in straight.index]
    twice = straight.assign(ids=pd.Series(ids, dtype=straight["ids"].dtype))
    names = sorted(straight["ids"][0])
    assert problems(twice) == [f"examples taken twice in an epoch: {names[0]} in epoch 0, {names[1]} in epoch 0"]
    assert problems(straight, steps=6) == ["steps beyond 6: 7, 8"]
    assert problems(straight, steps=12) == ["steps without a batch: 9, 10, 11, and 1 more"]
    assert problems(straight.iloc[:5], epoch_length=LENGTH) == []
    assert problems(straight.drop(index=[5, 11]), epoch_length=LENGTH) == [
        "batches never taken (epoch, index): (0, 5), (1, 5)"
    ]


def test_what_lies_beyond_a_checkpoint_is_cut(tmp_path: Path) -> None:
    first = Ledger(tmp_path, engine())
    state = take(first, start(), range(1, 5))
    kept = first.flush(4)
    take(first, state, range(5, 8))
    first.flush(7)
    resumed = Ledger(tmp_path, engine())
    resumed.cut(4, kept)
    assert problems(read(tmp_path), steps=4, epoch_length=LENGTH) == []
    take(resumed, state, range(5, 7))
    resumed.cut(4)  # back once more, in the same process: what was not flushed is forgotten
    take(resumed, state, range(5, 10))
    assert set(resumed.flush(9) or {}) == {"00000001-00000004.parquet", "00000005-00000009.parquet"}
    assert [Position(*place) for place in places(tmp_path)] == [batch.position for batch in order(9)]
    resumed.cut(0)
    assert read(tmp_path).empty


def test_a_file_that_was_altered_is_set_aside_and_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Ledger(tmp_path, engine())
    state = take(first, start(), range(1, 3))
    first.flush(2)
    state = take(first, state, range(3, 5))
    first.flush(4)
    take(first, state, range(5, 7))
    kept = first.flush(6)
    (tmp_path / "00000001-00000002.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000003-00000004.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        Ledger(tmp_path, engine()).cut(6, kept)
    assert "00000001-00000002.damaged" in caplog.text
    assert "lacks 00000003-00000004.parquet" in caplog.text
    assert problems(read(tmp_path))[0] == "steps without a batch: 1, 2, 3, and 1 more"


def test_batches_passed_over_stay_noted_whatever_is_cut(tmp_path: Path) -> None:
    """Steps 3 and 4 go wrong; training goes back to step 2, then goes wrong again and goes back once more."""
    ledger, wanted = Ledger(tmp_path, engine()), order(8)
    take(ledger, start(), range(1, 3))
    ledger.flush(2)
    for number in (2, 3):
        ledger.add(number + 1, wanted[number : number + 1], used=False, reason="not finite")
    ledger.cut(2)
    ledger.pass_over(3, wanted[2:4], "rolled back")
    ledger.add(3, wanted[4:5])
    ledger.cut(2)
    ledger.pass_over(3, wanted[4:5], "rolled back")
    for number in (5, 6, 7):
        ledger.add(number - 2, wanted[number : number + 1])
    ledger.flush(5)
    rows = read(tmp_path)
    assert problems(rows, steps=5, epoch_length=LENGTH) == []
    assert [wanted.index(b) for b in wanted if b.ids in {tuple(i) for i in rows[~rows["used"]]["ids"]}] == [2, 3, 4]
    assert set(rows[~rows["used"]]["reason"]) == {"rolled back"}
    assert counts(rows) == Counter(i for n, b in enumerate(wanted) if n not in (2, 3, 4) for i in b.ids)
    assert facts(rows)["batches_unused"] == 3
    ledger.cut(2)  # the file of steps 3 to 5 is gone, and what was passed over in it is noted anew
    ledger.flush(3)
    assert list(read(tmp_path)["used"]) == [True, True, False, False, False]


def share(folder: Path, state: dict[str, Any], steps: tuple[int, int], sequence_parallel: int) -> tuple[Any, Any]:
    """One attempt: some steps, then a checkpoint, then a step that no checkpoint follows."""
    ledger = Ledger(folder, engine(sequence_parallel))
    ledger.cut(steps[0] - 1)
    state = take(ledger, state, range(*steps))
    files = ledger.flush(steps[1] - 1)
    take(ledger, state, range(steps[1], steps[1] + 1))
    return state, files


def test_from_two_ranks_to_one_and_back_nothing_is_repeated_or_left_out(tmp_path: Path, ranks: Ranks) -> None:
    state, done = start(), 1
    for count, steps, sequence_parallel in ((2, 2, 1), (1, 3, 1), (2, 2, 2), (2, 3, 1), (1, 2, 1)):
        run = (tmp_path, state, (done, done + steps), sequence_parallel)
        said = ranks(share, *run, count=count) if count > 1 else [share(*run)]
        assert all(answer == said[0] for answer in said)
        state, done = said[0][0], done + steps
    rows = read(tmp_path)
    assert problems(rows, steps=12, epoch_length=LENGTH) == []
    assert len(rows) == 2 * 2 + 3 + 2 + 3 * 2 + 2
    assert counts(rows) == Counter(name for batch in order(len(rows)) for name in batch.ids)


def full_disk(folder: Path) -> tuple[Any, list[str], Any]:
    ledger = Ledger(folder, engine())
    state = take(ledger, start(), range(1, 4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    refused = ledger.flush(3)
    left = [path.name for path in folder.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    take(ledger, state, range(4, 6))
    return refused, left, ledger.flush(5)


def test_what_a_full_disk_refused_is_written_the_next_time(tmp_path: Path, ranks: Ranks) -> None:
    refused, left, files = ranks(full_disk, tmp_path, count=1)[0]
    assert refused is None
    assert left == []
    assert list(files) == ["00000001-00000005.parquet"]
    assert problems(read(tmp_path), steps=5, epoch_length=LENGTH) == []
