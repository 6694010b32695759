import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.compute.ending import Ending
from infra.compute.task import HUNG
from ml.training.watch import Beat, Watch, blame, read_beats, stacks_file

Ranks = Callable[..., list[Any]]


def beat(rank: int, step: int, doing: str, since: float, alive: float = 100.0) -> Beat:
    number = 2 * step + (doing == "computing")
    return Beat("run", rank, 1, number, step, doing, since, alive)


def test_a_heartbeat_says_what_a_rank_does(tmp_path: Path) -> None:
    with Watch(tmp_path, 2, 60.0, "run") as watch:
        watch.beat(5, "waiting for data")
    [found] = read_beats(tmp_path, "run")
    assert (found.rank, found.step, found.doing, found.pid) == (2, 5, "waiting for data", os.getpid())
    assert abs(found.time - time.time()) < 5
    assert read_beats(tmp_path, "another run") == []
    assert stacks_file(tmp_path, 2).read_text() == ""


def steady(folder: Path) -> tuple[float, bool]:
    """For how long it beat, and whether its heartbeat goes on without: the watch shows that the process lives."""
    started = time.monotonic()
    with Watch(folder, 0, 3.0, "run") as watch:
        while time.monotonic() < started + 5.0:
            watch.beat(1, "computing")
            time.sleep(0.1)
        taken, before = time.monotonic() - started, read_beats(folder, "run")[0].alive
        time.sleep(1.0)
        return taken, read_beats(folder, "run")[0].alive > before


def test_a_steady_rank_is_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    """Its watch would end the process: that is one of its own."""
    [(taken, alive)] = ranks(steady, tmp_path, count=1)
    assert taken > 3.0
    assert alive


def test_blame_falls_on_who_is_silent_then_on_who_is_behind() -> None:
    computing, waiting = beat(0, 7, "computing", 60.0), beat(1, 7, "waiting for data", 60.5)
    assert blame([computing, waiting], 100.0, 5.0).startswith(
        "rank 1 was waiting for data at step 7 for 40 s; the last"
    )
    earlier = beat(2, 6, "saving", 90.0)
    assert blame([computing, waiting, earlier], 100.0, 5.0).startswith("rank 2 was saving at step 6")
    frozen = beat(3, 7, "computing", 99.0, alive=50.0)
    said = blame([computing, waiting, earlier, frozen], 100.0, 5.0)
    assert said.startswith("rank 3 was computing at step 7 for 1 s and its process is stopped or gone; the last of")
    assert blame([computing], 100.0, 5.0) == "rank 0 was computing at step 7 for 40 s"


def hanging(folder: str) -> None:
    """Rank 1 sleeps where the others wait for it: in a collective."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with Watch(Path(folder), rank, 4.0, "run") as watch:
        watch.beat(3, "waiting for data")
        if rank == 1:
            the_data_that_never_comes()
        watch.beat(3, "computing")
        with suppress(RuntimeError):  # where rank 1 is ended a moment earlier
            dist.barrier()
        time.sleep(90)


def the_data_that_never_comes() -> None:
    time.sleep(90)


def test_a_rank_that_hangs_is_named_and_every_rank_leaves_its_stacks(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(hanging, str(tmp_path), expect_death=True, timeout=80) == [HUNG, HUNG]
    ending = Ending.read(tmp_path, "run")
    assert ending is not None
    assert (ending.code, ending.step) == (HUNG, 3)
    assert ending.reason.startswith("rank 1 was waiting for data at step 3")
    assert "rank 0 was computing at step 3" in ending.reason
    assert "the_data_that_never_comes" in stacks_file(tmp_path, 1).read_text()
    assert "barrier" in stacks_file(tmp_path, 0).read_text()


def greedy(folder: str) -> None:
    """A main thread that never lets go of the interpreter: a C call without releasing it."""
    with Watch(Path(folder), 0, 3.0, "run"):
        ctypes.PyDLL(None).sleep(90)


def test_a_rank_that_holds_the_interpreter_leaves_its_stacks(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(greedy, str(tmp_path), count=1, expect_death=True, timeout=80) == [1]
    assert "greedy" in stacks_file(tmp_path, 0).read_text()
