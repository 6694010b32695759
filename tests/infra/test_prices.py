"""Every price has a source and a date, and none is a catalog's mistake."""

from datetime import date
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from infra.prices import BOOK, PriceError, PriceRow, price, price_book

GOOD = {
    "id": "h200-test",
    "provider": "somebody",
    "gpu": "H200",
    "tier": "on-demand",
    "usd_per_hour": 3.99,
    "low": 3.0,
    "high": 5.0,
    "kind": "observed",
    "source": "a page",
    "observed_at": date(2026, 1, 1),
    "valid_from": date(2026, 1, 1),
    "note": "",
}


def test_the_book_holds_the_rows_that_recipes_name() -> None:
    assert price("h200-hist-2025q1").usd_per_hour == 2.00
    assert price("h200-od-2026").usd_per_hour == 3.99
    assert price("cpu-assume-2026").kind == "assumption"
    assert len(price_book()) >= 20


def test_every_row_has_a_source_and_a_date_that_has_been() -> None:
    for row in price_book().values():
        assert len(row.source) > 5, row.id
        assert date(2023, 1, 1) < row.observed_at <= date.today(), row.id
        assert row.valid_from <= date.today(), row.id


def test_nothing_but_an_observed_price_is_called_observed() -> None:
    for row in price_book().values():
        assert (row.tier in ("historical", "assumption")) == (row.kind != "observed"), row.id


def test_a_wrong_row_id_names_the_nearest() -> None:
    with pytest.raises(PriceError, match="did you mean 'h200-spot-2026'"):
        price("h200-spot-2027")


@pytest.mark.parametrize(
    ("tier", "usd"),
    [
        pytest.param("on-demand", 0.0, id="catalog bug: $0"),
        pytest.param("on-demand", 1.0, id="bid floor taken for a price"),
        pytest.param("on-demand", 15.01, id="above every offer"),
        pytest.param("on-demand", -2.0, id="negative"),
        pytest.param("on-demand", float("nan"), id="not a number"),
        pytest.param("spot", 0.49, id="spot too cheap"),
        pytest.param("spot", 8.01, id="spot too dear"),
    ],
)
def test_a_price_that_cannot_be_is_refused(tier: str, usd: float) -> None:
    with pytest.raises(ValidationError, match=r"h200-test|finite"):
        PriceRow.model_validate(GOOD | {"tier": tier, "usd_per_hour": usd, "low": usd, "high": usd})


@pytest.mark.parametrize(("tier", "usd"), [("on-demand", 1.5), ("on-demand", 15.0), ("spot", 0.5), ("spot", 8.0)])
def test_the_bounds_themselves_are_accepted(tier: str, usd: float) -> None:
    row = PriceRow.model_validate(GOOD | {"tier": tier, "usd_per_hour": usd, "low": usd, "high": usd})
    assert row.usd_per_hour == usd


def test_a_price_outside_its_own_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="outside its own range"):
        PriceRow.model_validate(GOOD | {"low": 4.5})


@pytest.mark.parametrize("missing", ["source", "provider", "observed_at"])
def test_a_price_without_provenance_is_refused(missing: str) -> None:
    with pytest.raises(ValidationError, match=missing):
        PriceRow.model_validate({key: value for key, value in GOOD.items() if key != missing})


def test_a_book_with_a_bad_row_names_it(tmp_path: Path) -> None:
    book = yaml.safe_load(BOOK.read_text(encoding="utf-8"))
    book["rows"][1]["usd_per_hour"] = 0
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(book), encoding="utf-8")
    with pytest.raises(PriceError, match=r"prices.yaml, row h200-od-2026: .*\$0"):
        price_book(path)


def test_a_repeated_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump({"rows": [GOOD, GOOD]}), encoding="utf-8")
    with pytest.raises(PriceError, match="more than once"):
        price_book(path)
