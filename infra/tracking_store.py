"""Where runs are kept: telling a server from an SQLite file, and finding out in seconds whether it can be used.

MLflow itself would try for minutes before it says that nobody listens.
"""

import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

CONNECT_SECONDS = 2.0


class TrackingError(RuntimeError):
    """A tracking server or database that cannot be used, with its address and what to do."""


def is_http(uri: str) -> bool:
    """True for the address of a server."""
    return uri.startswith(("http://", "https://"))


def sqlite_uri(file: Path) -> str:
    """URI of an SQLite store; SQLAlchemy 2.1 takes `%` and `?` in it for marks of its own, so they are quoted."""
    return f"sqlite:///{quote(str(file.absolute()), safe='/ :+~@,;=&()')}"


def sqlite_file(uri: str) -> Path | None:
    """File of an SQLite store; None for any other."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def artifact_uri(uri: str) -> str | None:
    """Where an embedded store keeps artifacts: beside its file. A server decides that itself (None)."""
    file = sqlite_file(uri)
    return (file.absolute().parent / "mlartifacts").as_uri() if file else None


def shown(uri: str) -> str:
    """The URI without a password, for messages."""
    parts = urlparse(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def probe(uri: str) -> None:
    """Raise TrackingError at once when nobody listens at the address, or the file cannot hold a database."""
    file = sqlite_file(uri)
    try:
        if is_http(uri):
            parts = urlparse(uri)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS).close()
        elif file is not None:
            _probe_sqlite(file)
    except (OSError, sqlite3.Error) as error:
        hint = "start that server" if is_http(uri) else "make it a file that this user can write"
        raise TrackingError(
            f"MLflow at {shown(uri)} cannot be used: {error}; {hint}, or set OPENSORA_TRACKING_URI"
        ) from error


@contextmanager
def only_one(uri: str) -> Iterator[None]:
    """Hold the lock of an SQLite store, while its tables may have to be made; other stores look after themselves."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    from filelock import FileLock

    with FileLock(f"{file}.lock"):
        yield


def _probe_sqlite(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab"):  # a file without write permission opens for reading, and fails only at the first run
        pass
    with closing(sqlite3.connect(file, timeout=CONNECT_SECONDS)) as connection:
        connection.execute("PRAGMA schema_version").fetchone()
