"""What a training achieves: throughput, the share of the hardware's peak it uses, and the share of time that counts.

Every second since the process started is one of these:

- useful: computing in a step that updated the weights and was kept;
- `data`: waiting for batches within such a step;
- `skipped`: a step that updated nothing (its loss or gradient was not finite);
- `thrown_away`: a step that a rollback took back; `redone`: a step that an earlier attempt had made already;
- `resume`, `checkpoint`, `validation`, `rollback`, ...: what `lost` was told;
- the rest, mostly start-up: imports, the network, the process group.

Goodput is useful seconds over all of them. The bill starts earlier, when the attempt is submitted: goodput over all
that is paid for is that of `infra.compute.resume`, by `seconds_useful`. Utilisation (MFU, arXiv 2204.02311, appendix
B) is model FLOPs, forward and backward without what is recomputed, over seconds of steps (their waits included) times
the peak of all ranks.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ml.training.step import StepReport


class Meter:
    """The meter of one attempt on one rank; `ranks` of `peak_flops_per_rank` FLOP/s work on every step.

    `started` is when the attempt began, in seconds since the epoch: when this process was, unless it is given.
    """

    def __init__(self, peak_flops_per_rank: float, ranks: int, started: float | None = None) -> None:
        self.peak_flops = peak_flops_per_rank * ranks
        self.started = psutil.Process().create_time() if started is None else started
        self._useful: list[float] = []
        self._lost: dict[str, float] = defaultdict(float)
        self._seconds = self._flops = 0.0
        self._again = 0

    def step(self, report: StepReport, seconds: float, waited: float) -> dict[str, float]:
        """A step was made, in so many seconds of which `waited` went to waiting for data; its numbers, for the log.

        `report` counts over all ranks, and its FLOPs are those of forward and backward.
        """
        self._seconds, self._flops = self._seconds + seconds, self._flops + report.flops
        self._account(report.updated, seconds, waited)
        return {
            "examples_per_second": report.examples / seconds,
            "tokens_per_second": report.tokens / seconds,
            "data_wait_share": waited / seconds,
            "mfu": report.flops / (seconds * self.peak_flops),
            "goodput": self.goodput(),
            "seconds_useful": sum(self._useful),
            "peak_memory_mb": peak_memory_mb(),
        }

    @contextmanager
    def lost(self, why: str) -> Iterator[None]:
        """Around work that is no step: its seconds count under `why`, whatever ends it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lost[why] += time.perf_counter() - began

    def thrown_away(self, steps: int) -> None:
        """The newest `steps` steps were taken back: they were not useful after all, and will be made again."""
        taken = self._useful[max(0, len(self._useful) - steps) :]
        del self._useful[max(0, len(self._useful) - steps) :]
        self._lost["thrown_away"] += sum(taken)

    def redo(self, steps: int) -> None:
        """The next `steps` steps were made by an earlier attempt, which was killed before it could save them."""
        self._again = max(0, steps)

    def goodput(self) -> float:
        """Useful seconds over seconds since the attempt started."""
        return sum(self._useful) / max(time.time() - self.started, 1e-9)

    def totals(self) -> dict[str, float]:
        """The attempt so far, for `result.json`: goodput, utilisation, peak memory, and where the seconds went."""
        whole = time.time() - self.started
        spent = {f"seconds_{why}": seconds for why, seconds in sorted(self._lost.items())}
        rest = whole - sum(self._useful) - sum(spent.values())
        return {
            "goodput": self.goodput(),
            "mfu": self._flops / (self._seconds * self.peak_flops) if self._seconds else 0.0,
            "peak_memory_mb": peak_memory_mb(),
            "seconds_attempt": whole,
            "seconds_useful": sum(self._useful),
            **spent,
            "seconds_other": max(0.0, rest),
        }

    def _account(self, updated: bool, seconds: float, waited: float) -> None:
        self._lost["data"] += waited
        computed = seconds - waited
        useful = updated and not self._again
        # Every step has its place, so that a rollback can take back the newest ones, whatever became of them.
        self._useful.append(computed if useful else 0.0)
        if not useful:
            self._lost["skipped" if not updated else "redone"] += computed
        self._again = max(0, self._again - 1)


def peak_memory_mb() -> float:
    """The most memory that this rank held so far, in MiB: tensors on its GPU where there is one, else the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # ru_maxrss is in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
