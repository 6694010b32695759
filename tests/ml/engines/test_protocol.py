import inspect

import pytest

from ml.engines.plain import PlainEngine
from ml.engines.protocol import Engine

METHODS = [name for name, member in inspect.getmembers(Engine, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_the_plain_engine_keeps_the_protocol(name: str) -> None:
    """Same parameters in the same order, so that the trainer can be handed either."""
    wanted, found = (inspect.signature(getattr(kind, name)) for kind in (Engine, PlainEngine))
    assert list(found.parameters) == list(wanted.parameters)


def test_the_protocol_is_what_the_design_names() -> None:
    named = {"setup", "accumulate", "backward", "step", "mean", "masters", "gather", "scatter", "save", "load"}
    assert set(METHODS) == named | {"barrier", "close", "learning_rate"}
    assert {"device", "dtype", "is_main", "data_rank", "data_size", "model"} == set(Engine.__annotations__)
