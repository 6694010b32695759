"""Arguments by position, for forwards that take their rarer ones by name or in the original's order."""

from collections.abc import Mapping, Sequence
from typing import Any


def named(names: Sequence[str], positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name: `positional` take `names` in order. Raises TypeError, as Python does for a signature."""
    if len(positional) > len(names):
        raise TypeError(f"forward takes {len(names)} further arguments by position ({', '.join(names)}) at most")
    told = dict(zip(names, positional, strict=False))
    twice = sorted(told.keys() & keywords.keys())
    if twice:
        raise TypeError(f"forward got {', '.join(twice)} by position and by name")
    return {**told, **keywords}
