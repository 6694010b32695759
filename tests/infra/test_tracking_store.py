"""A store that cannot be used says so in seconds, and says what to do."""

import shutil
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from infra.tracking import RunLog, Tracker
from infra.tracking_store import TrackingError, artifact_uri, only_one, probe, shown, sqlite_file, sqlite_uri


def test_nobody_listens() -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(TrackingError, match="refused; start that server, or set OPENSORA_TRACKING_URI"):
        Tracker(uri).check()
    assert time.monotonic() - started < 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match="make it a file that this user can write"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db").check()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"a letter, and no database at all" * 100)
    with pytest.raises(TrackingError, match="not a database"):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db").check()


def test_a_password_is_never_shown() -> None:
    assert shown("postgresql://opensora:secret@db/mlflow") == "postgresql://opensora:***@db/mlflow"
    with pytest.raises(TrackingError) as caught:
        probe("http://opensora:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


def test_an_embedded_store_keeps_artifacts_beside_its_file(tmp_path: Path) -> None:
    assert artifact_uri(f"sqlite:///{tmp_path}/mlflow.db") == f"file://{tmp_path}/mlartifacts"
    assert artifact_uri("http://127.0.0.1:5000") is None
    assert sqlite_uri(tmp_path / "mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert sqlite_file(sqlite_uri(tmp_path / "50%?" / "mlflow.db")) == tmp_path / "50%?" / "mlflow.db"
    assert sqlite_file("postgresql://db/mlflow") is None


@pytest.mark.parametrize("name", ["my work", "50 %?"])
def test_a_folder_may_have_any_name(empty_store: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name / "mlflow.db"
    file.parent.mkdir()
    shutil.copy(empty_store, file)
    tracker = Tracker(sqlite_uri(file))
    log = RunLog(tracker.uri, tracker.open("a", "b"))
    log.artifact(file.parent / "mlflow.db.lock")
    log.close()
    assert list(file.parent.glob("mlartifacts/*/artifacts/files/mlflow.db.lock"))


def test_only_stores_that_are_files_need_a_lock(tmp_path: Path) -> None:
    with only_one("postgresql://db/mlflow"), only_one(f"sqlite:///{tmp_path}/mlflow.db"):
        assert (tmp_path / "mlflow.db.lock").exists()
