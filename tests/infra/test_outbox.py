"""What is put into the box arrives once, in order, through outages and refusals."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from infra import outbox
from infra.outbox import Entry, Outbox, RefusedError, measures, texts


class Server:
    """A server that can be down, refuse entries by name, and remembers what it took."""

    def __init__(self) -> None:
        self.down = False
        self.refuses: set[str] = set()
        self.taken: list[str] = []
        self.calls = 0

    def send(self, entries: Sequence[Entry]) -> None:
        self.calls += 1
        if self.down:
            raise ConnectionError("nobody listens")
        if bad := self.refuses & {entry.key for entry in entries}:
            raise RefusedError(f"{bad} has a value")
        self.taken += [entry.key for entry in entries]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outbox]]:
    """Boxes that flush when the test says so, and are closed after it."""
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 60.0)
    monkeypatch.setattr(outbox, "CLOSING_SECONDS", 2.0)
    boxes: list[Outbox] = []

    def build(send: Callable[[Sequence[Entry]], None], tick: Callable[[], None] = lambda: None) -> Outbox:
        boxes.append(Outbox(send, tick))
        return boxes[-1]

    yield build
    for box in boxes:
        box.close()


def entries(count: int) -> list[Entry]:
    return [Entry("metric", str(i), float(i)) for i in range(count)]


def test_everything_arrives_in_order_in_few_calls(server: Server, make: Callable[..., Outbox]) -> None:
    box = make(server.send)
    for entry in entries(2500):
        box.put(entry)
    assert box.flush()
    assert server.taken == [str(i) for i in range(2500)]
    assert server.calls == 3


def test_entries_wait_out_an_outage_in_order(server: Server, make: Callable[..., Outbox]) -> None:
    box = make(server.send)
    server.down = True
    box.put(*entries(3))
    assert not box.flush()
    box.put(Entry("metric", "later", 0.0))
    server.down = False
    assert box.flush()
    assert server.taken == ["0", "1", "2", "later"]


def test_only_the_refused_entry_is_dropped(server: Server, make: Callable[..., Outbox]) -> None:
    server.refuses = {"1"}
    box = make(server.send)
    box.put(*entries(3))
    assert box.flush()
    assert server.taken == ["0", "2"]


def test_a_long_outage_loses_the_oldest_first(
    server: Server, make: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "WAITING_ENTRIES", 5)
    box = make(server.send)
    server.down = True
    box.put(*entries(4))
    assert not box.flush()
    box.put(*[Entry("metric", name, 0.0) for name in "abc"])
    assert not box.flush()
    server.down = False
    assert box.flush()
    assert server.taken == ["2", "3", "a", "b", "c"]


def test_the_thread_sends_by_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 0.01)
    box = Outbox(server.send)
    box.put(*entries(1))
    deadline = time.monotonic() + 10
    while not server.taken and time.monotonic() < deadline:
        time.sleep(0.01)
    box.close()
    assert server.taken == ["0"]


class Clock:
    """Seconds that pass only where the box waits: `Event` is what it waits with."""

    def __init__(self) -> None:
        self.now = 0.0
        clock = self

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                clock.now += timeout or 0.0
                return super().wait(0.001)

        self.Event, self.Lock, self.Thread = Event, threading.Lock, threading.Thread


def test_a_minute_without_a_server_costs_nothing_but_patience(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Records of every look arrive, in order; the task's log has one line, and the server is left in peace."""
    clock, server, tried = Clock(), Server(), list[float]()
    monkeypatch.setattr(outbox, "threading", clock)

    def send(batch: Sequence[Entry]) -> None:
        server.down = 10.0 <= clock.now < 70.0
        tried.extend([clock.now] if server.down else [])
        server.send(batch)

    def tick() -> None:
        put.append(f"at {clock.now:g}")
        box.put(Entry("metric", put[-1], clock.now))

    put, ready = list[str](), threading.Event()
    box = Outbox(send, lambda: tick() if ready.is_set() else None)
    ready.set()
    deadline = time.monotonic() + 30
    while clock.now < 200.0 and time.monotonic() < deadline:
        time.sleep(0.01)
    box.close()
    assert clock.now >= 200.0
    assert server.taken == put
    assert 2 <= len(tried) <= 6
    assert all(later - earlier >= 2 * outbox.FLUSH_SECONDS for earlier, later in itertools.pairwise(tried))
    assert [record.message for record in caplog.records] == [
        "tracking: nobody listens; records wait and the task goes on"
    ]


def test_closing_ticks_once_more_and_sends_the_rest(server: Server, make: Callable[..., Outbox]) -> None:
    def tick() -> None:
        box.put(Entry("metric", "load", 1.0))

    box = make(server.send, tick)
    box.put(*entries(1))
    box.close()
    box.close()
    assert server.taken == ["0", "load"]


def test_a_server_that_hangs_cannot_hold_up_the_end(
    make: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "CLOSING_SECONDS", 0.2)
    release = threading.Event()
    box = make(lambda batch: release.wait(20) and None)
    box.put(*entries(1))
    started = time.monotonic()
    box.close()
    assert time.monotonic() - started < 5
    release.set()


def test_numbers_that_are_not_finite_are_renamed() -> None:
    made = measures({"loss": float("nan"), "lr": 0.1, "norm": float("-inf")}, step=4)
    assert [(e.key, e.value, e.step) for e in made] == [
        ("nonfinite/loss", 1.0, 4),
        ("lr", 0.1, 4),
        ("nonfinite/norm", 1.0, 4),
    ]


def test_settings_are_written_as_text() -> None:
    assert texts("param", {"lr": 1e-4, "stages": ("a", "b")}) == [
        Entry("param", "lr", "0.0001"),
        Entry("param", "stages", "('a', 'b')"),
    ]
