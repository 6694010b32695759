"""What every entry (`python -m ml.curate`, `encode`, `train`, `sample`) has in common: its call and its result.

A task reads step folders, writes one step folder, and writes `result.json` last: its presence means finished.
"""

import argparse
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.tracking import RunLog
from infra.workspace import Workspace
from ml.recipe import Recipe

RESULT = "result.json"
# Loggers that report, on import, of kernels which nobody asked them for; torchao's are asked for by fp8.
NOISY = ("bitsandbytes", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
FP8 = "torchao"


class CallError(ValueError):
    """A task that was called without something it needs."""


@dataclass(frozen=True)
class Call:
    """One call of an entry: what to do (`op`), from which step folders, into which one, as which MLflow run.

    Of several ranks only the first logs; all of them know the run.
    """

    op: str
    given_recipe: Recipe | None
    workspace: Path
    out: Path
    inputs: Mapping[str, tuple[Path, ...]]
    options: Mapping[str, str]
    log: RunLog
    started: float = field(default_factory=time.monotonic)
    run_id: str = ""

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; raises CallError for a call that was given none (a shared corpus has none)."""
        if self.given_recipe is None:
            raise CallError(f"{self.op} needs --recipe FILE")
        return self.given_recipe

    def input(self, name: str) -> Path:
        """The one input folder of this name; raises CallError when there is none, or more than one."""
        folders = self.inputs.get(name, ())
        if len(folders) != 1:
            raise CallError(f"{self.op} needs exactly one --input {name}=FOLDER, got {len(folders)}")
        return folders[0]

    def option(self, name: str) -> str:
        """The option of this name; raises CallError when it was not given."""
        if name not in self.options:
            raise CallError(f"{self.op} needs --option {name}=VALUE")
        return self.options[name]

    def finish(
        self,
        metrics: Mapping[str, float],
        facts: Mapping[str, Any] | None = None,
        pictures: Sequence[str] = (),
        data: Sequence[str] | None = None,
    ) -> None:
        """Write `result.json`: numbers, facts, pictures, and the digest of the files that are the step's data."""
        files = sorted(data) if data is not None else _files(self.out, skip=pictures)
        seconds = round(time.monotonic() - self.started, 3)
        result: dict[str, Any] = {
            "op": self.op,
            "metrics": {**metrics, "seconds": seconds},
            "facts": dict(facts or {}),
            "pictures": list(pictures),
            "data": files,
            "data_version": _digest(self.out, files),
        }
        partial = self.out / f"{RESULT}.partial"
        partial.write_text(json.dumps(result, indent=2, sort_keys=True), encoding="utf-8")
        partial.replace(self.out / RESULT)
        self.log.metrics({key: float(value) for key, value in result["metrics"].items()})
        for picture in pictures:
            self.log.picture(self.out / picture)


def parse(argv: Sequence[str] | None, ops: Sequence[str], description: str) -> Call:
    """Parse a task's command line into a Call, with its output folder made.

    Raises SystemExit on an unknown op or flag (argparse says which), RecipeError on a bad recipe.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("op", choices=ops)
    parser.add_argument("--recipe", type=Path, help="resolved recipe document (YAML)")
    parser.add_argument("--workspace", type=Path, required=True, help="workspace root")
    parser.add_argument("--out", type=Path, required=True, help="folder of this step")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FOLDER", help="folder of a step it reads")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="further choice of the op")
    parser.add_argument("--run-id", help="MLflow run that this attempt logs to")
    parser.add_argument("--tracking-uri", help="MLflow tracking URI")
    args = parser.parse_args(argv)
    recipe = Recipe.parse(args.recipe.read_text(encoding="utf-8")) if args.recipe else None
    _hush(recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    inputs: dict[str, tuple[Path, ...]] = {}
    for name, value in (_pair(text) for text in args.input):
        inputs[name] = (*inputs.get(name, ()), Path(value))
    return Call(
        op=args.op,
        given_recipe=recipe,
        workspace=args.workspace,
        out=args.out,
        inputs=inputs,
        options=dict(_pair(text) for text in args.option),
        log=RunLog(args.tracking_uri, args.run_id) if main_rank() else RunLog(),
        run_id=args.run_id or "",
    )


def main_rank() -> bool:
    """Whether this process is the only one of its task, or the first of several that torchrun started."""
    return os.environ["RANK"] == "0" if "RANK" in os.environ else True


def lpips_weights(call: Call) -> Path:
    """The LPIPS weights file: of the input `lpips` where the call has one, else the one in the workspace's cache."""
    folder = call.input("lpips") if "lpips" in call.inputs else Workspace(call.workspace).cache / "lpips"
    return folder / "alex.safetensors"


def _hush(recipe: Recipe | None) -> None:
    """Quieten loggers that nobody asked."""
    fp8 = recipe is not None and any(phase.engine.fp8 for phase in recipe.phases)
    for name in NOISY if fp8 else (*NOISY, FP8):
        logging.getLogger(name).setLevel(logging.ERROR)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise CallError(f"{text!r} is not NAME=VALUE")
    return name, value


def _files(folder: Path, skip: Sequence[str]) -> list[str]:
    """Every data file below a folder: no pictures, no logs, no state of a training run that is only for resuming."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hidden = (RESULT, "task.log", "attempt.json", "recipe.yaml", "heartbeat", *skip)
    kept = (n for n in names if n not in hidden and not n.startswith("checkpoints/") and not n.endswith(".partial"))
    return sorted(kept)


def _digest(folder: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as stream:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
