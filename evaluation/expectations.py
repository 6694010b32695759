"""The door to Great Expectations: run the suite of a table over its frame, and leave a page a person can read.

Great Expectations takes seconds to import, so that happens inside `validate`. Its own Data Docs load style sheets and a
tracking logo from the network; `evaluation/validation_page.py` renders ours, which needs nothing but the file.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.derived import derive
from evaluation.suites import Expect, Severity, Suite, suite
from evaluation.validation_page import Line, Page, render
from ml.recipe import Recipe

SHOWN_IDS = 20
ORDER: tuple[Severity, ...] = ("info", "warning", "critical")
VERDICTS = {
    "passed": "everything holds",
    "info": "holds, with remarks",
    "warning": "someone should look",
    "critical": "do not build on this table",
}


@dataclass(frozen=True)
class Failure:
    """One expectation that does not hold: its meaning, column, severity, first 20 failing ids and failing rows.

    `count` is 0 and `ids` is empty for an expectation about the whole column or table; `observed` says what was seen.
    """

    expectation: str
    column: str
    severity: Severity
    ids: tuple[str, ...]
    count: int
    observed: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for asset metadata."""
        return asdict(self)


@dataclass(frozen=True)
class Validation:
    """Outcome for one table: `success` when everything holds, else the worst severity and every failure."""

    table: str
    success: bool
    max_severity: Severity | None
    failures: tuple[Failure, ...]
    num_expectations: int
    num_rows: int
    page: Path

    @property
    def blocks(self) -> bool:
        """Whether a critical expectation fails, so that nothing should be built on the table."""
        return self.max_severity == "critical"


def validate(table_name: str, frame: pd.DataFrame, recipe: Recipe | None, site_folder: Path) -> Validation:
    """Validate a manifest table and write `<table>.html` and `<table>.json` (Great Expectations' own result) beside it.

    About half a second a table after an import of five. Raises UnknownTableError for a table without a suite,
    ManifestError never: a missing column is a critical failure of the table, not an error of ours.
    """
    chosen = suite(table_name, recipe)
    results = _run(chosen, _derived_or_plain(table_name, frame, recipe))
    key = chosen.table.key
    found = [None if r["success"] else _failure(e, r, key) for e, r in zip(chosen.expects, results, strict=True)]
    failures = tuple(failure for failure in found if failure)
    worst = max((f.severity for f in failures), key=ORDER.index, default=None)
    site_folder.mkdir(parents=True, exist_ok=True)
    page = site_folder / f"{table_name}.html"
    validation = Validation(table_name, not failures, worst, failures, len(results), len(frame), page)
    result_file = page.with_suffix(".json")
    result_file.write_text(json.dumps(_shorten(results), indent=1, default=str), encoding="utf-8")
    page.write_text(render(_page(validation, chosen, found, recipe)), encoding="utf-8")
    return validation


def _derived_or_plain(table_name: str, frame: pd.DataFrame, recipe: Recipe | None) -> pd.DataFrame:
    """A table that lacks a column cannot be derived from; the suite then reports what is missing."""
    try:
        return derive(table_name, frame, recipe)
    except (KeyError, AttributeError):
        return frame


def _run(chosen: Suite, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Results in the order of the suite's expectations, as Great Expectations writes them in JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of the standard library, about Great Expectations' imports
        return _run_quietly(chosen, frame)


def _run_quietly(chosen: Suite, frame: pd.DataFrame) -> list[dict[str, Any]]:
    import great_expectations as gx
    import great_expectations.expectations as vocabulary
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset(chosen.table.name)
    whole = asset.add_batch_definition_whole_dataframe("whole")
    suite_ = gx.ExpectationSuite(name=chosen.table.name)
    for number, expect in enumerate(chosen.expects):
        make = getattr(vocabulary, expect.kind)
        meta = {"number": number, "meaning": expect.meaning}
        suite_.add_expectation(make(**expect.arguments, severity=expect.severity, meta=meta))
    definition = gx.ValidationDefinition(name=chosen.table.name, data=whole, suite=context.suites.add(suite_))
    outcome = context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [chosen.table.key]},
    )
    results = [result.to_json_dict() for result in outcome.results]
    return sorted(results, key=lambda r: r["expectation_config"]["meta"]["number"])


def _failure(expect: Expect, result: dict[str, Any], key: str) -> Failure:
    detail = result["result"]
    rows = detail.get("unexpected_index_list") or []
    ids = tuple(dict.fromkeys(str(row[key]) for row in rows if key in row))
    count = int(detail.get("unexpected_count") or 0)
    return Failure(expect.meaning, expect.column, expect.severity, ids[:SHOWN_IDS], count, _observed(result))


def _observed(result: dict[str, Any]) -> str:
    """What was seen, in a few words: failing values, the column's own number, or why it could not be computed."""
    detail = result["result"]
    if problem := _exception(result["exception_info"]):
        return problem
    if values := detail.get("partial_unexpected_list"):
        return ", ".join(dict.fromkeys(_short(value) for value in values[:5]))
    if missing := detail.get("partial_missing_list"):
        return f"missing: {', '.join(map(str, missing[:8]))}"
    seen = detail.get("observed_value")
    return "" if seen is None else f"observed {_short(seen)}"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _exception(info: dict[str, Any]) -> str:
    """First error message inside Great Expectations' exception record, whose shape depends on where it failed."""
    nested = [info, *(value for value in info.values() if isinstance(value, dict))]
    found = (str(record["exception_message"]) for record in nested if record.get("exception_message"))
    return next(found, "").split("\n")[0]


def _shorten(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results without the full lists of values and without tracebacks, which grow with the table."""
    kept = [{**r, "result": {k: v for k, v in r["result"].items() if k not in _LONG}} for r in results]
    return [{**r, "exception_info": _exception(r["exception_info"])} for r in kept]


_LONG = ("unexpected_list", "unexpected_index_list", "unexpected_index_query")


def _page(validation: Validation, chosen: Suite, found: list[Failure | None], recipe: Recipe | None) -> Page:
    lines = [_line(expect, failure) for expect, failure in zip(chosen.expects, found, strict=True)]
    lines.sort(key=lambda line: -ORDER.index(line.severity))
    level = validation.max_severity or "passed"
    return Page(validation.table, recipe.id if recipe else "corpus", VERDICTS[level], level, validation.num_rows, lines)


def _line(expect: Expect, failure: Failure | None) -> Line:
    return Line(
        passed=failure is None,
        severity=expect.severity,
        column=expect.column,
        meaning=expect.meaning,
        rule=_rule(expect),
        count=failure.count if failure else 0,
        observed=failure.observed if failure else "",
        ids=failure.ids if failure else (),
    )


def _rule(expect: Expect) -> str:
    """The expectation's arguments as a reader would write them: `>= 2, <= 15 where status == "ok"`."""
    given = expect.arguments
    words = {"min_value": ">= {}", "max_value": "<= {}", "value_set": "in {}", "regex": "like {}", "mostly": "for {}"}
    parts = [form.format(_rule_value(given[key])) for key, form in words.items() if key in given]
    where = f" where {given['row_condition']}" if "row_condition" in given else ""
    return ", ".join(parts) + where


def _rule_value(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
