"""Human preference: blind pairs of samples, votes on three axes, Bradley-Terry strengths with intervals, agreement.

The axes and the rule (a model wins when it wins at least two of three) are those of the Open-Sora 2.0 report. Two
checkpoints' samples of the same prompt and seed make a pair; which stands left is drawn from a seed, nobody is told.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.votes import Vote, votes_file
from infra.storage import sha256_of
from infra.workspace import Workspace
from ml.manifest import stable_id

AXES = ("visual_quality", "prompt_adherence", "motion")
WINNING_AXES = 2
RESAMPLES = 400
# Weight of the prior that keeps strengths finite when one side won every vote, in wins added to each side.
PRIOR_WINS = 0.1


class PreferenceError(ValueError):
    """A comparison that cannot be set up, with what is missing."""


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt and seed, as shown: `left` and `right` are files, `left_model` the set left is from."""

    id: str
    prompt: str
    left: Path
    right: Path
    left_model: str
    right_model: str


@dataclass(frozen=True)
class AxisResult:
    """One axis: votes, the chance that `model` is preferred to `against`, and its 95 % interval."""

    num_votes: int
    win_probability: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Preference:
    """One model against another so far; `agreement` is Krippendorff's alpha, None without repeated pairs."""

    model: str
    against: str
    num_votes: int
    num_voters: int
    axes: Mapping[str, AxisResult]
    strengths: Mapping[str, Mapping[str, float]]
    agreement: float | None
    wins: bool


def plan_pairs(first: Path, second: Path, seed: int) -> list[Pair]:
    """Every prompt and seed that two folders of samples share, sides and order drawn from `seed`.

    A folder is a finished `samples` step, named by its key. Raises PreferenceError when they share nothing.
    """
    tables = [pd.read_parquet(folder / "samples.parquet") for folder in (first, second)]
    shared = tables[0].merge(tables[1], on=["prompt", "prompt_index", "seed"], suffixes=("_first", "_second"))
    if shared.empty:
        raise PreferenceError(f"samples {first.name} and {second.name} share no prompt and seed: sample both alike")
    shared = shared.sort_values(["prompt_index", "seed"])
    generator = np.random.default_rng(seed)
    flips = generator.random(len(shared)) < 0.5
    pairs = [_pair(row, first, second, bool(flip)) for row, flip in zip(shared.to_dict("records"), flips, strict=True)]
    return [pairs[i] for i in generator.permutation(len(pairs))]


def sample_sets(current: Path) -> list[Path]:
    """Every finished set of samples of the same recipe, newest first, `current` before all others."""
    siblings = [path.parent for path in current.parent.glob("*/result.json")]
    others = [folder for folder in siblings if folder != current and (folder / "samples.parquet").is_file()]
    return [current, *sorted(others, key=lambda folder: (folder / "result.json").stat().st_mtime, reverse=True)]


def votes_digest(workspace: Workspace, recipe_id: str) -> str:
    """16 hex digits that change with every vote on a recipe's samples; `none` before the first."""
    path = votes_file(workspace.root, recipe_id)
    return sha256_of(path)[:16] if path.is_file() else "none"


def strengths(votes: Sequence[Vote], models: Sequence[str]) -> dict[str, float]:
    """Bradley-Terry strengths in log-odds, centred on 0; a tie counts as half a win for each side.

    P(a preferred to b) = 1 / (1 + exp(b - a)). Solved by choix's iterative Luce spectral ranking.
    """
    import choix

    place = {model: i for i, model in enumerate(models)}
    wins = np.full((len(models), len(models)), PRIOR_WINS) - PRIOR_WINS * np.eye(len(models))
    for vote in votes:
        left, right = place[vote.left_model], place[vote.right_model]
        share = {"left": 1.0, "tie": 0.5, "right": 0.0}[vote.choice]
        wins[left, right] += share
        wins[right, left] += 1.0 - share
    return dict(zip(models, map(float, choix.ilsr_pairwise_dense(wins)), strict=True))


def measure(votes: Sequence[Vote], model: str, against: str, seed: int = 0) -> Preference:
    """How `model` fares against `against` by the votes between all models; raises PreferenceError without votes."""
    between = [vote for vote in votes if {vote.left_model, vote.right_model} == {model, against}]
    if not between:
        raise PreferenceError(f"no votes yet between {model} and {against}")
    models = sorted({name for vote in votes for name in (vote.left_model, vote.right_model)})
    by_axis = {axis: [vote for vote in votes if vote.axis == axis] for axis in AXES}
    by_axis = {axis: some for axis, some in by_axis.items() if some}
    axes = {axis: _axis(some, models, (model, against), seed) for axis, some in by_axis.items()}
    return Preference(
        model=model,
        against=against,
        num_votes=len(between),
        num_voters=len({vote.voter for vote in between}),
        axes=axes,
        strengths={axis: strengths(some, models) for axis, some in by_axis.items()},
        agreement=krippendorff_alpha(between),
        wins=sum(result.win_probability > 0.5 for result in axes.values()) >= WINNING_AXES,
    )


def opponent(votes: Sequence[Vote], model: str) -> str | None:
    """The model that this one was compared with most often, or None."""
    sides = [{vote.left_model, vote.right_model} for vote in votes]
    met = Counter(name for pair in sides if model in pair for name in pair - {model})
    return met.most_common(1)[0][0] if met else None


def krippendorff_alpha(votes: Sequence[Vote]) -> float | None:
    """Krippendorff's alpha for nominal answers: 1 is full agreement, 0 what chance gives.

    A unit is one pair on one axis, an answer the preferred model or a tie, whichever side it stood on. None when no
    unit has two voters, or when all answers are the same, which leaves nothing to agree about.
    """
    answers = pd.DataFrame([{"unit": f"{v.pair}/{v.axis}", "answer": v.preferred} for v in votes])
    table = pd.crosstab(answers["unit"], answers["answer"]).to_numpy(dtype=np.float64)
    table = table[table.sum(axis=1) >= 2]
    per_unit, per_answer, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    expected = total**2 - (per_answer**2).sum()
    if not len(table) or expected == 0:
        return None
    disagreeing = ((per_unit**2 - (table**2).sum(axis=1)) / (per_unit - 1)).sum()
    return float(1.0 - (total - 1) * disagreeing / expected)


def _pair(row: Mapping[str, object], first: Path, second: Path, flip: bool) -> Pair:
    sides = [(first.name, first / str(row["path_first"])), (second.name, second / str(row["path_second"]))]
    (left_model, left), (right_model, right) = reversed(sides) if flip else sides
    identity = stable_id(*sorted((first.name, second.name)), row["prompt_index"], row["seed"])
    return Pair(identity, str(row["prompt"]), left, right, left_model, right_model)


def _axis(votes: Sequence[Vote], models: Sequence[str], sides: tuple[str, str], seed: int) -> AxisResult:
    """Point estimate and bootstrap interval; whole pairs are drawn, because votes on one pair resemble each other."""
    by_pair: dict[str, list[Vote]] = {}
    for vote in votes:
        by_pair.setdefault(vote.pair, []).append(vote)
    groups, generator = list(by_pair.values()), np.random.default_rng(seed)
    drawn: NDArray[np.int64] = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    chances = [_chance([v for g in row for v in groups[g]], models, sides) for row in drawn]
    low, high = np.quantile(chances, [0.025, 0.975])
    return AxisResult(len(votes), _chance(votes, models, sides), (float(low), float(high)))


def _chance(votes: Sequence[Vote], models: Sequence[str], sides: tuple[str, str]) -> float:
    found = strengths(votes, models)
    return float(1.0 / (1.0 + np.exp(found[sides[1]] - found[sides[0]])))
