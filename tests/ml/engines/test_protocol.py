import inspect

import pytest

from ml.engines.colossal import ColossalEngine
from ml.engines.fsdp import FsdpEngine
from ml.engines.plain import PlainEngine
from ml.engines.protocol import Engine

METHODS = [name for name, member in inspect.getmembers(Engine, inspect.isfunction) if not name.startswith("_")]
ENGINES: list[type[Engine]] = [PlainEngine, FsdpEngine, ColossalEngine]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_every_engine_keeps_the_protocol(name: str, kind: type[Engine]) -> None:
    """Same parameters in the same order, so that the trainer can be handed any."""
    wanted, found = (inspect.signature(getattr(each, name)) for each in (Engine, kind))
    assert list(found.parameters) == list(wanted.parameters)
    assert [p.default for p in found.parameters.values()] == [p.default for p in wanted.parameters.values()]


def test_the_protocol_is_what_the_design_names() -> None:
    run = {"cut", "setup", "accumulate", "backward", "step", "discard", "learning_rate", "close"}
    talk = {"total", "collect", "average", "barrier"}
    keep = {"masters", "moments", "gather", "scatter", "restore", "publish"}
    assert set(METHODS) == run | talk | keep
    assert set(Engine.__annotations__) == {"device", "dtype", "rank", "size", "data_rank", "data_size", "model"}
