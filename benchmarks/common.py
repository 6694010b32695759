"""What every benchmark does alike: time both sides in one run, turn about, and print them with their ratio.

A ratio is the median over repeats of (first side) / (second side), both timed back to back, so that a busy machine
slows both sides of each pair rather than one of them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

console = Console(width=120)
Work = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """Seconds of both sides, one entry a repeat."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of both sides."""
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratio(self) -> float:
        """How many times longer the first side takes: the median of each repeat's own ratio."""
        return statistics.median(a / b for a, b in zip(self.first, self.second, strict=True))


def arguments(description: str) -> argparse.Namespace:
    """The command line of a benchmark: `--tiny` for a smoke test, `--repeats`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, in seconds: shows that it runs, not how fast")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each side, after a warm-up")
    return parser.parse_args()


def time_both(first: Work, second: Work, repeats: int) -> Pair:
    """Seconds of both sides, after one warm-up each, turn about."""
    first(), second()
    timed = [(_seconds(first), _seconds(second)) for _ in range(repeats)]
    return Pair(tuple(a for a, _ in timed), tuple(b for _, b in timed))


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Processor, torch and threads, for a table's caption."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{_processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    """A table with the machine under it; the first column is text, the others numbers."""
    shown = Table(
        title=title, caption=f"{machine()}\n{note}", box=box.SIMPLE_HEAD, caption_justify="left", pad_edge=False
    )
    for index, name in enumerate(heads):
        shown.add_column(name, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def times(value: float) -> str:
    """A ratio, as in 5.0x."""
    return f"{value:.2f}x"


def _seconds(work: Work) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    """Name of the processor; Linux says it in /proc/cpuinfo."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
