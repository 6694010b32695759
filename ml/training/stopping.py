"""Wishes to stop: a signal, or a file that somebody put into the step's folder."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from infra.compute.task import STOP

# A cancelled task or a machine that is taken away; Slurm's notice ahead of the end of the time (`--signal=USR1@120`).
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


Asked = Callable[[], str]


def never() -> str:
    """Nobody asks."""
    return ""


@contextmanager
def stop_asked(folder: Path) -> Iterator[Asked]:
    """A callable that gives "" until somebody asks training to stop, then who did; the old handlers come back.

    A file `stop` in the folder asks every rank that sees it: agents that hear of a spot machine's end write one. One
    from before this process was started asked an earlier attempt, and is removed, as is one that was served. Main
    thread only.
    """
    file, asked = folder / STOP, list[str]()
    forget(file)

    def note(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: asked[0] if asked else f"file {STOP}" if file.exists() else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # The wish is served: it must not stop the next attempt, which may start within the clock's resolution.
        file.unlink(missing_ok=True)


def forget(file: Path) -> None:
    """Remove what an earlier attempt left; all ranks may do so at once."""
    with suppress(FileNotFoundError):
        if file.stat().st_mtime < psutil.Process().create_time():
            file.unlink()
