"""The ledger of consumed examples: which batch each step took, so that what the weights have seen can be proved.

    consumed/00000001-00000040.parquet   one row a batch of steps 1 to 40, of all data ranks

A file is added with every checkpoint, which keeps its digest. A run that goes on from a checkpoint drops what lies
beyond it, so the ledger is at all times what the weights on the disk have seen.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import atomic_stream, sha256_of
from ml.batching.sampler import Batch
from ml.engines.protocol import Engine

log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("micro", pa.int32()),
        ("epoch", pa.int64()),
        ("index", pa.int64()),
        ("data_rank", pa.int32()),
        ("cell", pa.string()),
        ("ids", pa.list_(pa.string())),
        ("used", pa.bool_()),
        ("reason", pa.string()),
    ]
)
SEGMENT = "????????-????????.parquet"
NAMED = 3  # findings of one kind that are named one by one


@dataclass(frozen=True)
class Row:
    """One batch: the step and micro-batch it was of, its place in the order, who computed it, and what became of it.

    `used` says that it is in the weights; `reason` says why it is not.
    """

    step: int
    micro: int
    epoch: int
    index: int
    data_rank: int
    cell: str
    ids: tuple[str, ...]
    used: bool
    reason: str


class Ledger:
    """The ledger of one training run, in one folder; each rank notes its own batches."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self._own: list[Row] = []  # of this rank, since the last flush
        self._passed: list[Row] = []  # of this rank, passed over since it started
        self._pending: list[Row] = []  # of all ranks, flushed and not on the disk; on the main rank
        self._start = 1  # the first step of the next file
        self._digests: dict[str, str] = {}  # of the files; on the main rank

    def add(self, step: int, batches: Sequence[Batch], used: bool = True, reason: str = "") -> None:
        """Note this rank's batches of a step, one a micro-batch; `used` says that the weights were updated."""
        self._own += self._rows(step, batches, used, reason)

    def pass_over(self, step: int, batches: Sequence[Batch], reason: str) -> None:
        """Note batches that the sampler skips from now on; `step` is the next one. They stay noted whatever is cut."""
        rows = self._rows(step, batches, False, reason)
        self._passed += rows
        self._own += rows

    def flush(self, step: int) -> dict[str, str] | None:
        """Write what was noted up to a step, and return the sha256 of every file of the ledger, for the checkpoint.

        None, on all ranks, when the disk refuses: a warning says why, and the next flush writes these rows too.
        Together.
        """
        # The ranks of a group share a batch: the first of them speaks.
        first = self.engine.rank % (self.engine.size // self.engine.data_size) == 0
        given = self.engine.collect([astuple(row) for row in self._own] if first else [])
        self._own = []
        segments: dict[str, str] | None = {}
        if self.engine.is_main:
            self._pending += [Row(*row) for rows in given for row in rows]
            segments = self._write(step)
        return self.engine.collect(segments)[0]  # type: ignore[no-any-return]

    def cut(self, step: int, segments: Mapping[str, str] | None = None) -> None:
        """Forget all that lies beyond a step, which training goes on from; `segments` is what its checkpoint keeps.

        A file that is not what the checkpoint says is set aside with a warning: its batches show as missing. Together.
        """
        again = [replace(row, step=step + 1) for row in self._passed if row.step > step]
        self._passed = [row for row in self._passed if row.step <= step] + again
        self._own, self._pending, self._start, self._digests = again.copy(), [], step + 1, {}
        if self.engine.is_main:
            for path in sorted(self.folder.glob(SEGMENT)):
                if _last_step(path) > step:
                    path.unlink()
                else:
                    self._keep(path, segments)
            for name in sorted({*(segments or {})} - {*self._digests}):
                log.warning("ledger %s lacks %s: which examples its steps took is not known", self.folder, name)
        self.engine.barrier()

    def _rows(self, step: int, batches: Sequence[Batch], used: bool, reason: str) -> list[Row]:
        rank = self.engine.data_rank
        places = ((batch, batch.position.epoch, batch.position.index) for batch in batches)
        return [
            Row(step, micro, epoch, index, rank, str(batch.cell), batch.ids, used, reason)
            for micro, (batch, epoch, index) in enumerate(places)
        ]

    def _write(self, step: int) -> dict[str, str] | None:
        path = self.folder / f"{self._start:08d}-{step:08d}.parquet"
        ordered = sorted(self._pending, key=lambda row: (row.step, row.micro, row.data_rank))
        try:
            _write_rows(path, ordered)
            self._digests[path.name] = sha256_of(path)
        except (OSError, pa.ArrowException) as error:
            log.warning("ledger %s was not written: %s: %s", path, type(error).__name__, error)
            return None
        self._pending, self._start = [], step + 1
        return dict(self._digests)

    def _keep(self, path: Path, segments: Mapping[str, str] | None) -> None:
        digest = sha256_of(path)
        if segments is None or (path.name in segments and segments[path.name] == digest):
            self._digests[path.name] = digest
            return
        path.replace(path.with_suffix(".damaged"))
        log.warning("ledger %s is not what its checkpoint recorded: set aside as %s.damaged", path, path.stem)


def read(folder: Path) -> pd.DataFrame:
    """All rows of a ledger, a column for each field of `Row`, in Arrow's types (an id costs its bytes, no object)."""
    files = sorted(folder.glob(SEGMENT))
    tables = [pq.read_table(path, schema=SCHEMA) for path in files]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
    return frame


def counts(rows: pd.DataFrame) -> dict[str, int]:
    """How often each id is in the weights."""
    found = pc.value_counts(_examples(rows[rows["used"]]).column("id"))
    return dict(zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True))


def facts(rows: pd.DataFrame, steps: int | None = None, epoch_length: int | None = None) -> dict[str, Any]:
    """What a finished training says of its data: different examples seen, epochs begun, batches not used, problems."""
    used = rows[rows["used"]]
    return {
        "examples_seen": pc.count_distinct(_examples(used).column("id")).as_py(),
        "epochs": int(used["epoch"].max()) + 1 if len(used) else 0,
        "batches_unused": len(rows) - len(used),
        "ledger_problems": problems(rows, steps, epoch_length),
    }


def problems(rows: pd.DataFrame, steps: int | None = None, epoch_length: int | None = None) -> list[str]:
    """What is wrong with a ledger, in words; an exact one has nothing wrong.

    Batches that are missing, or there twice, or not in the order of the sampler; an example twice in an epoch; steps
    without a batch, or beyond the last of `steps`. Without `epoch_length` (batches) an epoch is taken to be as long as
    its highest index says.
    """
    if rows.empty:
        return ["no batch was noted"] if steps else []
    return [
        *_missing_steps(rows, steps),
        *_missing_batches(rows, epoch_length or int(rows["index"].max()) + 1),
        *_repeated_batches(rows),
        *_disorder(rows),
        *_repeated_examples(rows),
    ]


def _missing_steps(rows: pd.DataFrame, steps: int | None) -> list[str]:
    there = set(rows["step"].unique())
    last = steps or int(max(there))
    absent = [str(step) for step in range(1, last + 1) if step not in there]
    beyond = [str(step) for step in sorted(there) if step > last]
    return [*_found(absent, "steps without a batch: {}"), *_found(beyond, f"steps beyond {last}: {{}}")]


def _missing_batches(rows: pd.DataFrame, length: int) -> list[str]:
    numbers = (rows["epoch"] * length + rows["index"]).drop_duplicates().sort_values()
    there = np.concatenate([[-1], numbers.to_numpy(dtype="int64")])
    gaps = np.flatnonzero(np.diff(there) > 1)
    absent = [str(divmod(n, length)) for gap in gaps for n in range(int(there[gap]) + 1, int(there[gap + 1]))]
    return _found(absent, "batches never taken (epoch, index): {}")


def _repeated_batches(rows: pd.DataFrame) -> list[str]:
    return _found(_places(rows[rows.duplicated(["epoch", "index"])]), "batches taken again (epoch, index): {}")


def _disorder(rows: pd.DataFrame) -> list[str]:
    used = rows[rows["used"]].sort_values(["step", "micro", "data_rank"])
    epoch, index = (used[name].to_numpy(dtype="int64") for name in ("epoch", "index"))
    back = (epoch[1:] < epoch[:-1]) | ((epoch[1:] == epoch[:-1]) & (index[1:] < index[:-1]))
    return _found(_places(used[1:][back]), "batches taken later than their turn (epoch, index): {}")


def _repeated_examples(rows: pd.DataFrame) -> list[str]:
    once = rows.drop_duplicates(["epoch", "index"])  # a batch taken again is named as such
    table = _examples(once).group_by(["epoch", "cell", "id"]).aggregate([([], "count_all")])
    again = table.filter(pc.greater(table.column("count_all"), 1))
    again = again.sort_by([("epoch", "ascending"), ("cell", "ascending"), ("id", "ascending")])
    named = [f"{row['id']} in epoch {row['epoch']}" for row in again.to_pylist()]
    return _found(named, "examples taken twice in an epoch: {}")


def _examples(rows: pd.DataFrame) -> pa.Table:
    """One row an example: epoch, bucket and id. A clip is another example in another bucket."""
    table = pa.Table.from_pandas(rows[["epoch", "cell", "ids"]], preserve_index=False).combine_chunks()
    ids = table.column("ids").combine_chunks()
    parents = pc.list_parent_indices(ids)
    about = {name: table.column(name).take(parents) for name in ("epoch", "cell")}
    return pa.table({**about, "id": pc.list_flatten(ids)})


def _places(rows: pd.DataFrame) -> list[str]:
    columns = (rows[name] for name in ("epoch", "index", "step"))
    return [f"({epoch}, {index}) in step {step}" for epoch, index, step in zip(*columns, strict=True)]


def _found(named: Sequence[str], text: str) -> list[str]:
    """One sentence for all findings of a kind, with the first of them and how many more there are."""
    more = [f"and {len(named) - NAMED} more"] if len(named) > NAMED else []
    return [text.format(", ".join([*named[:NAMED], *more]))] if named else []


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    with atomic_stream(path) as stream:
        pq.write_table(pa.table(columns, schema=SCHEMA), stream, compression="zstd")


def _last_step(path: Path) -> int:
    return int(path.stem.split("-")[1])
