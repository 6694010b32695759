import threading
import time

import pytest

from ml.curation import parallel


def test_results_come_in_the_order_of_items():
    def slow_first(item: int) -> int:
        time.sleep(0.05 if item == 0 else 0)
        return item * item

    assert parallel.spread(slow_first, list(range(6)), "squares", lambda: None) == [0, 1, 4, 9, 16, 25]


def test_the_first_error_is_raised_and_the_rest_is_not_begun():
    begun = []

    def fail(item: int) -> int:
        begun.append(item)
        time.sleep(0.02)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        parallel.spread(fail, list(range(500)), "fails", lambda: None)
    assert len(begun) < 500


def test_a_watcher_sees_life_while_one_item_takes_long(monkeypatch):
    monkeypatch.setattr(parallel, "HEARTBEAT_SECONDS", 0.05)
    beats = []
    parallel.spread(lambda _: time.sleep(0.3), [1], "long", lambda: beats.append(1))
    assert len(beats) >= 3


def test_work_goes_to_more_than_one_thread_where_there_are_cores():
    if parallel.num_workers() < 2:
        pytest.skip("one core")
    barrier = threading.Barrier(2, timeout=10)
    parallel.spread(lambda _: barrier.wait(), [1, 2], "both", lambda: None)


def test_nothing_to_do_is_no_error():
    assert parallel.spread(lambda item: item, [], "nothing", lambda: None) == []
