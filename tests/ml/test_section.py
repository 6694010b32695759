"""What every section of a recipe refuses."""

import pytest
from pydantic import ValidationError

from ml.section import Fraction, Name, Positive, PositiveFloat, Section


class Sample(Section):
    """One field of each kind."""

    share: Fraction = 0.5
    count: Positive = 1
    rate: PositiveFloat = 1.0
    name: Name = "a"


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("share", [0, 0.3, 1], [-0.1, 1.1, "half"]),
        ("count", [1, 7], [0, -1, 1.5]),
        ("rate", [1e-9, 3], [0, -2.0]),
        ("name", ["a", "stage_1"], ["", "Stage", "1a", "a-b"]),
    ],
)
def test_fields_hold_what_their_kind_allows(field: str, good: list, bad: list) -> None:
    for value in good:
        assert getattr(Sample(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValidationError):
            Sample(**{field: value})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Sample(nmae="a")


def test_sections_do_not_change() -> None:
    section = Sample()
    with pytest.raises(ValidationError, match="frozen"):
        section.count = 2
    assert section.model_copy(update={"count": 2}) != section
    assert hash(section) == hash(Sample())
