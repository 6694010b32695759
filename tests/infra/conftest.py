"""An empty MLflow store costs several seconds to make, and a millisecond to copy."""

import shutil
from pathlib import Path

import pytest

from infra.tracking import Tracker


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite file of a store without experiments or runs."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{file}").check()
    return file


@pytest.fixture
def tracker(empty_store: Path, tmp_path: Path) -> Tracker:
    """A tracker with a store of its own."""
    file = tmp_path / "workspace" / "mlflow.db"
    file.parent.mkdir()
    shutil.copy(empty_store, file)
    return Tracker(f"sqlite:///{file}")
