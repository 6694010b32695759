"""Arguments by position get the names of a signature, and Python's complaints."""

import pytest

from ml.models.positional import named


def test_positions_take_names_in_order_and_keywords_stay() -> None:
    assert named(("fps", "height", "width"), (24, 240), {"width": 426, "other": 1}) == {
        "fps": 24,
        "height": 240,
        "width": 426,
        "other": 1,
    }


def test_too_many_and_twice_named_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes 1 further arguments by position \(fps\)"):
        named(("fps",), (24, 240), {})
    with pytest.raises(TypeError, match="got fps by position and by name"):
        named(("fps", "height"), (24,), {"fps": 24})
