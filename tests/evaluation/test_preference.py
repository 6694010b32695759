"""Preference: blind plans, Bradley-Terry closed forms, Krippendorff's textbook example, the two-of-three rule."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evaluation.preference import (
    AXES,
    PRIOR_WINS,
    PreferenceError,
    krippendorff_alpha,
    measure,
    opponent,
    plan_pairs,
    sample_sets,
    strengths,
    votes_digest,
)
from evaluation.votes import Vote, append_votes, votes_file
from infra.workspace import Workspace


def _samples(folder: Path, prompts: int = 8, seeds: Sequence[int] = range(5)) -> Path:
    folder.mkdir(parents=True)
    grid = [(i, s) for i in range(prompts) for s in seeds]
    rows = [{"prompt": f"prompt {i}", "prompt_index": i, "seed": s, "path": f"videos/{i}-{s}.mp4"} for i, s in grid]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
    (folder / "result.json").touch()
    return folder


def _votes(choices: str, axis: str = "motion", flip: bool = False) -> list[Vote]:
    """One vote a letter on pairs of their own: n new wins, o old wins, t tie; new stands left unless flipped."""
    left, right = ("old", "new") if flip else ("new", "old")
    named = {"n": "right" if flip else "left", "o": "left" if flip else "right", "t": "tie"}
    return [Vote(f"p{i}", left, right, axis, named[c], "me", 1.0, 1.0) for i, c in enumerate(choices)]


def test_a_plan_holds_every_pair_once_with_sides_and_order_drawn_from_the_seed(tmp_path):
    first, second = _samples(tmp_path / "aaa"), _samples(tmp_path / "bbb")
    plan = plan_pairs(first, second, seed=3)
    assert len({pair.id for pair in plan}) == 40
    assert plan == plan_pairs(first, second, seed=3)
    assert plan != plan_pairs(first, second, seed=4)
    lefts = sum(pair.left_model == "aaa" for pair in plan)
    assert 10 < lefts < 30
    assert all({pair.left_model, pair.right_model} == {"aaa", "bbb"} for pair in plan)
    assert all(pair.left.name == pair.right.name and pair.left_model == pair.left.parts[-3] for pair in plan)
    assert [pair.prompt for pair in plan] != sorted(pair.prompt for pair in plan)


def test_a_pair_has_one_id_whichever_side_it_is_shown_on(tmp_path):
    first, second = _samples(tmp_path / "aaa"), _samples(tmp_path / "bbb")
    assert {p.id for p in plan_pairs(first, second, 0)} == {p.id for p in plan_pairs(second, first, 9)}


def test_only_shared_samples_pair_and_none_is_an_error(tmp_path):
    first, second = _samples(tmp_path / "aaa", prompts=2), _samples(tmp_path / "bbb", prompts=1, seeds=range(3))
    assert len(plan_pairs(first, second, 0)) == 3
    with pytest.raises(PreferenceError, match="share no prompt and seed"):
        plan_pairs(first, _samples(tmp_path / "ccc", seeds=(7, 8)), 0)


def test_sample_sets_are_finished_ones_newest_first(tmp_path):
    current, old, older = (_samples(tmp_path / name) for name in ("now", "old", "older"))
    os.utime(old / "result.json", (2, 2))
    os.utime(older / "result.json", (1, 1))
    (_samples(tmp_path / "unfinished") / "result.json").unlink()
    assert sample_sets(current) == [current, old, older]


def test_strengths_of_two_models_are_the_log_odds_of_their_wins():
    found = strengths(_votes("nnnnnnnnoo"), ["new", "old"])
    odds = np.log((8 + PRIOR_WINS) / (2 + PRIOR_WINS))
    assert found["new"] - found["old"] == pytest.approx(odds)
    assert sum(found.values()) == pytest.approx(0.0)
    assert strengths(_votes("nnnnnnnnoo", flip=True), ["new", "old"]) == pytest.approx(found)


def test_a_tie_is_half_a_win_and_a_clean_sweep_stays_finite():
    halves = strengths(_votes("nottt"), ["new", "old"])
    assert halves["new"] == pytest.approx(0.0)
    sweep = strengths(_votes("nnnnn"), ["new", "old"])
    assert 1.0 < sweep["new"] < 10.0


def test_strengths_recover_known_ones_from_many_votes():
    truth, generator = {"a": 1.0, "b": 0.0, "c": -1.0}, np.random.default_rng(0)
    votes = []
    for i in range(6000):
        left, right = generator.choice(list(truth), 2, replace=False)
        wins = generator.random() < 1 / (1 + np.exp(truth[right] - truth[left]))
        votes.append(Vote(f"p{i}", str(left), str(right), "motion", "left" if wins else "right", "me", 1.0, 1.0))
    assert strengths(votes, list(truth)) == pytest.approx(truth, abs=0.12)


def test_a_model_wins_with_two_of_three_axes():
    votes = [*_votes("nnno", AXES[0]), *_votes("nnno", AXES[1]), *_votes("oooo", AXES[2])]
    found = measure(votes, "new", "old")
    assert found.wins
    assert not measure(votes, "old", "new").wins
    assert (found.num_votes, found.num_voters) == (12, 1)
    quality = found.axes[AXES[0]]
    assert quality.win_probability == pytest.approx((3 + PRIOR_WINS) / (4 + 2 * PRIOR_WINS))
    assert quality.interval[0] < quality.win_probability < quality.interval[1]


def test_intervals_narrow_with_more_pairs_but_not_with_more_votes_on_the_same_pair():
    few = _votes("nnno")
    repeated = [replace(vote, voter=f"v{i}") for i in range(25) for vote in few]
    many = _votes("nnno" * 25)

    def width(votes: list[Vote]) -> float:
        low, high = measure(votes, "new", "old").axes["motion"].interval
        return high - low

    assert width(many) < 0.25 < width(repeated)


def test_no_votes_are_an_error_and_the_usual_opponent_is_found():
    with pytest.raises(PreferenceError, match="no votes yet"):
        measure([], "new", "old")
    assert opponent(_votes("no"), "new") == "old"
    assert opponent(_votes("no"), "other") is None


def test_alpha_of_krippendorffs_own_nominal_example():
    # "Computing Krippendorff's Alpha-Reliability" (2011), section C: 4 observers, 12 units, alpha = 0.743.
    answers = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    votes = [
        Vote(f"u{unit}", f"m{answer}", "other", "motion", "left", f"v{i}", 1.0, 1.0)
        for unit, row in enumerate(answers)
        for i, answer in enumerate(row)
    ]
    assert krippendorff_alpha(votes) == pytest.approx(0.743, abs=5e-4)


def test_alpha_ignores_sides_and_needs_repeated_pairs():
    assert krippendorff_alpha(_votes("nono")) is None
    both = [*_votes("nono"), *_votes("nono", flip=True)]
    assert krippendorff_alpha(both) == pytest.approx(1.0)
    assert krippendorff_alpha(_votes("nn") * 2) is None


def test_the_digest_changes_with_every_vote(tmp_path):
    space = Workspace(tmp_path)
    digests = [votes_digest(space, "v2_0-tiny")]
    for vote in _votes("no"):
        append_votes(votes_file(tmp_path, "v2_0-tiny"), [vote])
        digests.append(votes_digest(space, "v2_0-tiny"))
    assert digests[0] == "none"
    assert len(set(digests)) == 3
