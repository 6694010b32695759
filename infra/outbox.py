"""A buffer between a task and a server that may be slow or gone: records wait here, and a thread carries them over.

Putting a record costs microseconds and never fails. When the server is lost, records wait (the oldest go first once
there are too many) and the thread tries again, ever less often; the task never notices more than one line in its log.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
CLOSING_SECONDS = 20.0
# A million steps of one metric would take about 200 MB; no outage that a task survives lasts that long.
WAITING_ENTRIES = 200_000
BATCH_ENTRIES = 1000


class RefusedError(ValueError):
    """Records that the server will never take, such as a second value of a parameter: sending again cannot help."""


@dataclass(frozen=True)
class Entry:
    """One record on its way: `key` is the name, or the local path of an artifact whose `value` is its folder."""

    kind: Literal["metric", "param", "tag", "artifact"]
    key: str
    value: float | str
    time_ms: int = 0
    step: int = 0


class Outbox:
    """Carries entries to `send` from a thread; `tick` runs before each flush and may add entries of its own.

    `send` raises RefusedError for entries that can never be sent, and anything else when it is worth trying again; it
    must bear to be given the same entry twice.
    """

    def __init__(self, send: Callable[[Sequence[Entry]], None], tick: Callable[[], None] = lambda: None) -> None:
        """Start the thread."""
        self._send = send
        self._tick = tick
        self._waiting: deque[Entry] = deque(maxlen=WAITING_ENTRIES)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._closing = threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._carry, name="outbox", daemon=True)
        self._thread.start()

    def put(self, *entries: Entry) -> None:
        """Take entries over; returns at once."""
        with self._lock:
            self._waiting.extend(entries)

    def __len__(self) -> int:
        """Entries that wait."""
        return len(self._waiting)

    def flush(self) -> bool:
        """Try to send everything that waits, now; True when nothing is left."""
        with self._sending:
            while batch := self._take():
                if not self._deliver(batch):
                    return False
        return True

    def close(self) -> None:
        """Send what waits and stop; gives up after CLOSING_SECONDS, and says how much was lost."""
        if self._closing.is_set():
            return
        self._closing.set()
        # The last flush runs in the thread, so that a server that hangs cannot hold up the end of the process.
        self._thread.join(CLOSING_SECONDS)
        if self._waiting:
            log.warning("tracking: %d records were never sent, the server did not come back", len(self._waiting))

    def _carry(self) -> None:
        while not self._closing.wait(min(FLUSH_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)):
            self._tick()
            self.flush()
        self._tick()
        self.flush()

    def _take(self) -> list[Entry]:
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(BATCH_ENTRIES, len(self._waiting)))]

    def _deliver(self, batch: Sequence[Entry]) -> bool:
        """Send a batch, or put it back; a refused one is sent entry by entry, so that only the culprit is dropped."""
        try:
            self._send(batch)
        except RefusedError as error:
            if len(batch) > 1:
                return all([self._deliver([entry]) for entry in batch])
            log.warning("tracking: dropped %s %s: %s", batch[0].kind, batch[0].key, error)
        except Exception as error:  # whatever a vendor raises, the task goes on
            self._put_back(batch)
            if not self._failures:
                log.warning("tracking: %s; records wait and the task goes on", error)
            self._failures = min(self._failures + 1, 10)
            return False
        self._failures = 0
        return True

    def _put_back(self, batch: Sequence[Entry]) -> None:
        with self._lock:
            room = WAITING_ENTRIES - len(self._waiting)
            self._waiting.extendleft(reversed(batch[len(batch) - min(room, len(batch)) :]))


def now_ms() -> int:
    """Milliseconds since 1970, as tracking servers count time."""
    return int(time.time() * 1000)


def texts(kind: Literal["param", "tag"], values: Mapping[str, object]) -> list[Entry]:
    """Parameters or tags as entries."""
    return [Entry(kind, str(key), str(value)) for key, value in values.items()]


def measures(values: Mapping[str, float], step: int = 0) -> list[Entry]:
    """Numbers as entries of now; one that is not finite becomes `nonfinite/<key>` = 1, since no chart can hold it."""
    now = now_ms()
    named = {key if math.isfinite(value) else f"nonfinite/{key}": value for key, value in values.items()}
    return [Entry("metric", str(k), float(v) if math.isfinite(v) else 1.0, now, step) for k, v in named.items()]
