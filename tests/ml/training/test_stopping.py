import os
import signal
import time
from pathlib import Path

import pytest

from ml.training.stopping import stop_asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish_and_the_old_handler_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    heard = list[int]()
    before = signal.signal(number, lambda got, _: heard.append(got))
    try:
        with stop_asked(tmp_path) as asked:
            assert asked() == ""
            os.kill(os.getpid(), number)
            assert asked() == number.name
            assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_a_file_asks_until_it_was_served(tmp_path: Path) -> None:
    """One that was there before this process looked asks it too; the next attempt is not asked by what was served."""
    (tmp_path / "stop").touch()
    with stop_asked(tmp_path) as asked:
        assert asked() == "file stop"
    with stop_asked(tmp_path) as asked:
        assert asked() == ""


def test_a_file_that_asked_an_earlier_attempt_is_removed(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "stop", (hour_ago, hour_ago))
    with stop_asked(tmp_path) as asked:
        assert asked() == ""
    assert not (tmp_path / "stop").exists()
