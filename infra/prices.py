"""The price book: dated, sourced dollars for an accelerator-hour, read from `prices.yaml` and checked.

A catalog that says $0 has made bills of $0 (SkyPilot issues 3615 and 4657) and a bid floor of $1 has looked like a
bargain (9156): a row outside the bounds of its tier is an error, not a price.
"""

import difflib
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

BOOK = Path(__file__).parent / "prices.yaml"

# Dollars per hour that a price of 2024 to 2026 can be (peers.md, 6.5); wider than every row that was found.
SPOT_BOUNDS, RENT_BOUNDS, CPU_BOUNDS = (0.50, 8.00), (1.50, 15.00), (0.001, 1.00)

Text = Annotated[str, Field(min_length=1)]


class PriceError(ValueError):
    """A price that does not exist or cannot be one, naming the row and, where there is one, the nearest."""


class PriceRow(BaseModel):
    """One price: dollars per accelerator-hour (virtual core for `CPU`), with its provider, tier, dates and source."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    provider: Text
    gpu: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9-]*$")]
    tier: Literal["on-demand", "spot", "block", "historical", "assumption"]
    usd_per_hour: float
    low: float
    high: float
    kind: Literal["observed", "assumption", "historical"]
    source: Text
    observed_at: date
    valid_from: date
    note: str

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest dollars per hour that are believable for this kind of row."""
        if self.gpu == "CPU":
            return CPU_BOUNDS
        return SPOT_BOUNDS if self.tier == "spot" else RENT_BOUNDS

    @model_validator(mode="after")
    def _believable(self) -> Self:
        low, high = self.bounds
        if not low <= self.usd_per_hour <= high:
            raise ValueError(
                f"{self.id}: ${self.usd_per_hour} an hour is no {self.tier} price of a {self.gpu} (${low} to ${high}); "
                "check the catalog it came from"
            )
        if not self.low <= self.usd_per_hour <= self.high:
            raise ValueError(f"{self.id}: ${self.usd_per_hour} lies outside its own range {self.low} to {self.high}")
        return self


@cache
def price_book(path: Path = BOOK) -> Mapping[str, PriceRow]:
    """Every row by its id; raises PriceError for a book with a row that is wrong or repeated."""
    rows: dict[str, PriceRow] = {}
    for document in yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]:
        try:
            row = PriceRow.model_validate(document)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
            raise PriceError(f"{path.name}, row {document.get('id', document)}: {said}") from None
        if row.id in rows:
            raise PriceError(f"{path.name}: row {row.id} stands there more than once")
        rows[row.id] = row
    return rows


def price(row_id: str) -> PriceRow:
    """The row of this id; raises PriceError naming the nearest."""
    book = price_book()
    if row_id not in book:
        near = difflib.get_close_matches(row_id, list(book), n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; known: {', '.join(book)}"
        raise PriceError(f"no price row {row_id!r}{hint}")
    return book[row_id]
