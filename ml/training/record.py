"""What the main rank tells the world while it trains: `loss.csv`, a progress bar, the run's metrics and heartbeat."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infra.tracking import RunLog
from ml.training.curves import LossLog, read_log

log = logging.getLogger(__name__)
# What a row holds beside numbers worth a curve.
NOT_LOGGED = {"step", "seconds", "examples", "tokens", "bucket"}


@contextmanager
def best_effort(path: Path) -> Iterator[None]:
    """Around writing what training can do without: a full disk costs a warning."""
    try:
        yield
    except OSError as error:
        log.warning("%s was not written: %s; training goes on", path, error)


class Record:
    """The record of one training run; without a log (on every rank but the main one) it keeps and shows nothing."""

    def __init__(self, path: Path, stage: str, steps: int, log: RunLog | None) -> None:
        self.path, self.stage, self.steps, self.log = path, stage, steps, log
        self._rows: LossLog | None = None
        self._bar: Any = None

    @contextmanager
    def opened(self, done: int) -> Iterator[None]:
        """Keep rows from step `done` on; the file is closed whatever happens."""
        if self.log is None:
            yield
            return
        self._rows = LossLog(self.path, done)
        self._bar = tqdm(total=self.steps, initial=done, desc=self.stage, unit="step", mininterval=1.0)
        try:
            yield
        finally:
            with best_effort(self.path):
                self._rows.close()
            self._bar.close()

    def last(self) -> int:
        """The last step that an earlier attempt recorded; 0 if there was none."""
        steps = read_log(self.path)["step"]
        return 0 if steps.empty else int(steps.max())

    def add(self, row: Mapping[str, Any], terms: Mapping[str, float]) -> None:
        """A step was made: its row, and the terms of its loss."""
        if self.log is None or self._rows is None:
            return
        with best_effort(self.path):
            self._rows.add(row)
        numbers = {name: float(value) for name, value in row.items() if name not in NOT_LOGGED}
        self.log.metrics({**numbers, **{f"loss_{name}": value for name, value in terms.items()}}, step=int(row["step"]))
        self.log.heartbeat()
        self._bar.update()
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

    def cut(self, done: int) -> None:
        """Forget every step after `done`: training went back there."""
        if self._rows is None:
            return
        self._rows.close()
        self._rows = LossLog(self.path, done)
        self._bar.n = done
        self._bar.refresh()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.log is not None:
            tqdm.write(text)
