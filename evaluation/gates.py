"""The gate: rules of the recipe read a report and say whether its checkpoint may be released, and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.report import Report
from ml.sections import Rule


@dataclass(frozen=True)
class Decision:
    """Whether every rule holds, and one line of explanation a rule, in the recipe's order."""

    passed: bool
    lines: tuple[str, ...]


def judge(report: Report, rules: Sequence[Rule]) -> Decision:
    """Hold a report against the rules. A metric that is absent fails its rule with the reason; it never passes.

    A rule without `relative_to` compares with its number. With it, the number is a share: `at_most: 0.9, relative_to:
    loss/untrained` asks for metric <= 0.9 x loss/untrained.
    """
    verdicts = [_verdict(report, rule) for rule in rules]
    passed = bool(verdicts) and all(holds for holds, _ in verdicts)
    return Decision(passed, tuple(f"{'pass' if holds else 'FAIL'}  {why}" for holds, why in verdicts))


def _verdict(report: Report, rule: Rule) -> tuple[bool, str]:
    for name in (rule.metric, rule.relative_to):
        if name is not None and (why := _unusable(report, name)):
            return False, f"{rule.metric}: {why}"
    limits = [(sign, share) for sign, share in ((">=", rule.at_least), ("<=", rule.at_most)) if share is not None]
    if not limits:
        return False, f"{rule.metric}: the rule sets neither at_least nor at_most"
    value = report.metrics[rule.metric]
    base = report.metrics[rule.relative_to] if rule.relative_to else 1.0
    holds = all(value >= share * base if sign == ">=" else value <= share * base for sign, share in limits)
    asked = " and ".join(f"{sign} {_limit(share, base, rule.relative_to)}" for sign, share in limits)
    return holds, f"{rule.metric} = {value:.4g}, asked {asked}"


def _limit(share: float, base: float, relative_to: str | None) -> str:
    return f"{share * base:.4g} ({share:g} x {relative_to} {base:.4g})" if relative_to else f"{share:g}"


def _unusable(report: Report, name: str) -> str:
    """Why a metric cannot be read, or nothing."""
    if name not in report.metrics:
        reason = report.absent.get(name, "the report does not have it")
        return f"{name} is absent: {reason}"
    return "" if math.isfinite(report.metrics[name]) else f"{name} is {report.metrics[name]}"
