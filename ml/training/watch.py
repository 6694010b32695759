"""A watch over every rank: where each one stands, and what it did when nothing moved any more.

    heartbeats/rank-00000.json   step, what it does there, since when, and when the process itself was last seen alive
    stacks/rank-00000.txt        the stacks of all its threads, when it took no step for too long

A rank that waits for another is as silent as the one that hangs. Every rank therefore dumps its own stacks, and the
first to write the record of the end compares all heartbeats to say who was behind.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.compute.ending import Ending
from infra.compute.task import HUNG, STACKS

HEARTBEATS = "heartbeats"
# A twentieth of the patience between two looks, but ten seconds at most: a thousand ranks write to one folder.
LONGEST_TICK_SECONDS, SHARE = 10.0, 20
# How long the first rank that notices waits for the others to dump their stacks.
LONGEST_PAUSE_SECONDS = 15.0
# A process that has not been seen for so many looks, and so long, is stopped, or gone with its machine. A busy host may
# leave a live one without a turn for a second or two.
SILENT_TICKS, SILENT_SECONDS = 4, 5.0


@dataclass(frozen=True)
class Beat:
    """Where a rank stands: step, what it does since `time`, and when its watch was last `alive` (epoch seconds).

    All ranks go through the same beats: who is at a lower `number` waits for nobody.
    """

    run_id: str
    rank: int
    pid: int
    number: int
    step: int
    doing: str
    time: float
    alive: float

    def words(self, now: float) -> str:
        """For a person."""
        return f"rank {self.rank} was {self.doing} at step {self.step} for {now - self.time:.0f} s"


class Watch:
    """Context manager: `beat` says that a rank moves on; `hang_seconds` without one end the process with HUNG.

    A main thread that never lets go of the interpreter is caught too, a little later, by a thread that needs none
    (faulthandler's): then there are stacks, and no record.
    """

    def __init__(self, folder: Path, rank: int, hang_seconds: float, run_id: str) -> None:
        self.folder, self.rank, self.hang_seconds, self.run_id = folder, rank, hang_seconds, run_id
        self.tick = min(LONGEST_TICK_SECONDS, hang_seconds / SHARE)
        self.pause = min(LONGEST_PAUSE_SECONDS, hang_seconds / 2)
        # How long nothing moved is told by a clock that nobody sets.
        self._beat, self._since = self._new(0, 0, "starting"), time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        for folder in (HEARTBEATS, STACKS):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self._stacks = stacks_file(self.folder, self.rank).open("w", encoding="utf-8")
        self.beat(0, "starting")
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closing.set()
        self._thread.join()
        self._write()
        self._stacks.close()

    def beat(self, step: int, doing: str) -> None:
        """Say what this rank does now; microseconds, and the file follows within a tick."""
        self._beat, self._since = self._new(self._beat.number + 1, step, doing), time.monotonic()
        late = self.hang_seconds + 2 * self.pause
        faulthandler.dump_traceback_later(late, exit=True, file=self._stacks)

    def _new(self, number: int, step: int, doing: str) -> Beat:
        now = time.time()
        return Beat(self.run_id, self.rank, os.getpid(), number, step, doing, now, now)

    def _look(self) -> None:
        while not self._closing.wait(self.tick):
            self._write()
            beat = self._beat
            if time.monotonic() - self._since > self.hang_seconds:
                self._hangs(beat)

    def _hangs(self, beat: Beat) -> None:
        """Dump the stacks, let the others dump theirs, and end this process, unless it moved on after all."""
        print(f"rank {self.rank}: no step for {self.hang_seconds:g} s, its stacks are in {self._stacks.name}")
        sys.stdout.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        deadline = time.monotonic() + self.pause
        while time.monotonic() < deadline and not self._closing.is_set():
            time.sleep(min(self.tick, self.pause))
            self._write()
        if self._beat is not beat or self._closing.is_set():
            return
        silent = max(SILENT_SECONDS, SILENT_TICKS * self.tick)
        reason = blame(read_beats(self.folder, self.run_id), time.time(), silent)
        with suppress(OSError):
            Ending(self.run_id, HUNG, reason, beat.step, self.rank).write(self.folder)
        print(f"rank {self.rank} stopped at step {beat.step}: {reason}", file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _write(self) -> None:
        """Put the heartbeat into its file, whole; a full disk is not the watch's affair."""
        file = heartbeat_file(self.folder, self.rank)
        partial = file.with_suffix(".partial")
        with suppress(OSError):
            partial.write_text(json.dumps({**asdict(self._beat), "alive": time.time()}), encoding="utf-8")
            partial.replace(file)


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return folder / HEARTBEATS / f"rank-{rank:05d}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank's stacks are, if it ever hung."""
    return folder / STACKS / f"rank-{rank:05d}.txt"


def read_beats(folder: Path, run_id: str) -> list[Beat]:
    """The heartbeats of one run, by rank; files of other attempts do not count."""
    found = []
    for file in sorted((folder / HEARTBEATS).glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(file.read_text(encoding="utf-8"))))
    return [beat for beat in found if beat.run_id == run_id]


def blame(beats: Sequence[Beat], now: float, silent_seconds: float) -> str:
    """Who was behind, in words: a silent process, else the lowest step, the fewest beats, the oldest of them."""
    silent = [beat for beat in beats if now - beat.alive > silent_seconds]
    behind = min(silent or beats, key=lambda beat: (beat.step, beat.number, beat.time))
    others = [beat for beat in beats if beat is not behind]
    because = " and its process is stopped or gone" if silent else ""
    last = f"; the last of the others: {max(others, key=lambda beat: beat.time).words(now)}" if others else ""
    return f"{behind.words(now)}{because}{last}"
