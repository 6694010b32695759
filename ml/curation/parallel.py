"""Both cores, one progress bar: decoding, encoding and inference all release Python's lock, so threads are enough."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

HEARTBEAT_SECONDS = 10.0


def num_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    label: str,
    beat: Callable[[], None],
    weigh: Callable[[Item], float] = lambda _: 1.0,
) -> list[Result]:
    """Do `work` on every item over all cores; results in the order of items.

    `label` names the progress bar, `weigh` says how far an item moves it, `beat` is called every ten seconds so that
    a watcher sees life. The first exception cancels what has not begun and is raised.
    """
    with (
        ThreadPoolExecutor(max_workers=num_workers()) as pool,
        tqdm(total=sum(map(weigh, items)), desc=label, mininterval=2.0, unit_scale=True) as bar,
    ):
        futures = {pool.submit(work, item): item for item in items}
        try:
            _follow(futures, bar, beat, weigh)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _follow(
    futures: dict[Future[Result], Item], bar: "tqdm[None]", beat: Callable[[], None], weigh: Callable[[Item], float]
) -> None:
    pending, last = set(futures), time.monotonic()
    while pending:
        done, pending = wait(pending, timeout=HEARTBEAT_SECONDS, return_when=FIRST_COMPLETED)
        _settle(done, futures, bar, weigh)
        if time.monotonic() - last >= HEARTBEAT_SECONDS:
            last = time.monotonic()
            beat()


def _settle(
    done: Iterable[Future[Result]],
    futures: dict[Future[Result], Item],
    bar: "tqdm[None]",
    weigh: Callable[[Item], float],
) -> None:
    for future in done:
        future.result()
        bar.update(weigh(futures[future]))
