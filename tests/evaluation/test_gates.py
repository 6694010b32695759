"""The gate: limits, shares of a baseline, and absence that never passes."""

from dataclasses import replace

import pytest

from evaluation.gates import judge
from ml.recipe import Recipe
from ml.sections import Rule


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (Rule(metric="loss/held_out", at_most=0.8), True),
        (Rule(metric="loss/held_out", at_most=0.79), False),
        (Rule(metric="loss/held_out", at_least=0.8, at_most=0.9), True),
        (Rule(metric="loss/held_out", at_least=0.81, at_most=0.9), False),
        (Rule(metric="loss/held_out", at_most=0.8, relative_to="loss/untrained"), True),
        (Rule(metric="loss/held_out", at_most=0.75, relative_to="loss/untrained"), False),
        (Rule(metric="loss/untrained", at_least=1.25, relative_to="loss/held_out"), True),
        (Rule(metric="loss/untrained", at_least=1.26, relative_to="loss/held_out"), False),
    ],
)
def test_limits_and_shares(report, rule, passes):
    assert judge(report, [rule]).passed is passes


def test_an_absent_metric_or_baseline_fails_with_its_reason(report):
    decision = judge(report, [Rule(metric="vbench/scene", at_least=0.0), Rule(metric="vbench/color", at_least=0.0)])
    assert not decision.passed
    assert decision.lines[0] == "FAIL  vbench/scene: vbench/scene is absent: no <weights>"
    assert "the report does not have it" in decision.lines[1]
    relative = judge(report, [Rule(metric="loss/held_out", at_most=1.0, relative_to="loss/best")])
    assert not relative.passed


def test_nan_no_limit_and_no_rules_do_not_pass(report):
    broken = replace(report, metrics={**report.metrics, "loss/held_out": float("nan")})
    assert "is nan" in judge(broken, [Rule(metric="loss/held_out", at_most=1.0)]).lines[0]
    assert not judge(report, [Rule(metric="loss/held_out")]).passed
    assert not judge(report, []).passed


def test_one_failing_rule_fails_the_gate_and_every_line_says_what_was_asked(report):
    decision = judge(report, Recipe.load("v2_0").evaluation.gate)
    assert not decision.passed
    assert decision.lines[0] == "pass  loss/held_out = 0.8, asked <= 0.9 (0.9 x loss/untrained 1)"
    assert decision.lines[1].startswith("FAIL  reconstruction/psnr")
    assert decision.lines[2] == "pass  vbench/temporal_flickering = 0.86, asked >= 0.8"
