"""A toy task that tests run as a real process: it does what its arguments say, in the order they say it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.compute.task import Resources, Task

TOY = """
import argparse, json, os, pathlib, signal, sys, time

parser = argparse.ArgumentParser()
for name in ("--out", "--run-id", "--tracking-uri"):
    parser.add_argument(name, required=True)
parser.add_argument("--do", nargs="+", required=True)
args = parser.parse_args()
out = pathlib.Path(args.out)
with (out / "starts").open("a") as stream:
    stream.write(args.run_id + "\\n")
for word in args.do:
    verb, _, noun = word.partition("=")
    if verb == "say":
        print(noun, flush=True)
    elif verb == "ppid":
        print(os.getppid(), flush=True)
    elif verb == "sleep":
        time.sleep(float(noun))
    elif verb == "await":
        deadline = time.monotonic() + 60
        while not (out / noun).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    elif verb == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif verb == "raise":
        raise ValueError(noun)
    elif verb == "exit":
        sys.exit(int(noun))
    elif verb == "finish":
        (out / "result.json").write_text(json.dumps({"metrics": {"answer": 42.0}}))
"""

MakeTask = Callable[..., Task]


@pytest.fixture
def make_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTask:
    """Factory `make_task("say=hello", "finish", key="k")` of tasks that do so, in folders below `tmp_path`."""
    (tmp_path / "toy_task.py").write_text(TOY, encoding="utf-8")
    paths = (
        [str(tmp_path), *os.environ["PYTHONPATH"].split(os.pathsep)] if "PYTHONPATH" in os.environ else [str(tmp_path)]
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def make(*words: str, key: str = "0123456789abcdef") -> Task:
        out = tmp_path / "steps" / "toy" / key
        out.mkdir(parents=True, exist_ok=True)
        return Task(
            name="toy-tiny/shots/live",
            module="toy_task",
            arguments=("--out", str(out), "--do", *words),
            out=out,
            resources=Resources("CPU:2", 1, "cpu-assume-2026"),
            purpose="data",
            experiment="toy",
            tags={"recipe": "toy"},
        )

    return make
