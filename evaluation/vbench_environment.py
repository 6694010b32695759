"""The environment that VBench runs in: `.venv-vbench` at the repository root, made once from `environments/vbench.txt`.

VBench 0.1.5 pins numpy<2 and transformers 4.33.2, which no modern environment can hold, so it gets its own and is
called through a subprocess. Making it took 12 s beside a CPU build of torch in the local wheel folder, and 1.8 GB.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "environments" / "vbench.txt"
FOLDER = ROOT / ".venv-vbench"
MARKER = "opensora-lock.sha256"


class EnvironmentFailedError(RuntimeError):
    """The VBench environment could not be made; the message holds the command and what it said."""


def ensure_environment(folder: Path = FOLDER, lock: Path = LOCK) -> Path:
    """Make the environment unless it already fits the lock file, and return its Python interpreter.

    Safe to call from several processes: the second waits for the first. Prints uv's own progress to stderr. Raises
    EnvironmentFailedError when uv fails or is not installed.
    """
    python = folder / "bin" / "python"
    if is_ready(folder, lock):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder / "making.lock"):
        if is_ready(folder, lock):
            return python
        print(f"making {folder.name} from {lock.name} ...", file=sys.stderr, flush=True)
        _uv("venv", "--allow-existing", "--python", sys.executable, str(folder))
        _uv("pip", "install", "--python", str(python), "-r", str(lock))
        (folder / MARKER).write_text(_digest(lock), encoding="utf-8")
    return python


def is_ready(folder: Path = FOLDER, lock: Path = LOCK) -> bool:
    """Whether the environment exists and was made from exactly this lock file and this Python version."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8") == _digest(lock)


def _digest(lock: Path) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return hashlib.sha256(lock.read_bytes() + version.encode()).hexdigest()


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _uv(*arguments: str) -> None:
    """Run uv; wheels that pip would look for in local folders are found as well, which uv does not do by itself."""
    environment = {"UV_SYSTEM_CERTS": "true", **os.environ}  # trust what this system trusts, as pip does
    if "UV_FIND_LINKS" not in environment and "PIP_FIND_LINKS" in environment:
        environment["UV_FIND_LINKS"] = environment["PIP_FIND_LINKS"]
    command = [*_uv_command(), *arguments]
    try:
        subprocess.run(command, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFailedError(f"making the VBench environment failed: {' '.join(command)}: {error}") from error


def _uv_command() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    return [found] if found else [sys.executable, "-m", "uv"]


if __name__ == "__main__":
    print(ensure_environment())
