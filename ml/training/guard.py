"""Steps gone wrong: which are passed over, when training goes back to its last checkpoint, and when it gives up."""

import math
import statistics
from collections import deque
from typing import Literal

from ml import methods

Verdict = Literal["good", "bad", "rollback"]


class TrainingDiverged(RuntimeError):  # noqa: N818 (it says what happened)
    """Training that went wrong and stays wrong, with the step and the examples it came from."""


class Guard:
    """Judges each step by the rule of `methods.Guard`; every rank must show it the same numbers.

    Nothing is saved: a resumed run counts anew, and judges spikes again once it has seen `window` losses.
    """

    def __init__(self, section: methods.Guard) -> None:
        self.section = section
        self._recent: deque[float] = deque(maxlen=section.window)
        self._bad = 0
        self._rollbacks = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Whether a step was good, was bad and made no update, or is to be undone with what led to it."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._bad += 1
            return "rollback" if self._bad >= self.section.patience else "bad"
        self._bad = 0
        if self._is_spike(loss):
            return "rollback"
        self._recent.append(loss)
        return "good"

    def rolled_back(self, where: str) -> None:
        """Count a way back, taken for what happened at `where`; raises TrainingDiverged when there are too many."""
        self._bad = 0
        self._rollbacks += 1
        if self._rollbacks > self.section.rollbacks:
            raise TrainingDiverged(
                f"{where}: this is wrong turn {self._rollbacks}, and guard.rollbacks is {self.section.rollbacks}. Look "
                f"at these examples, lower optimizer.lr or raise its warmup_steps; checkpoints are from before it"
            )

    def _is_spike(self, loss: float) -> bool:
        """Whether a finite loss stands out of a full window of losses."""
        if self.section.spike is None or len(self._recent) < self.section.window:
            return False
        return loss > self.section.spike * statistics.median(self._recent)
