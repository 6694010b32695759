"""A recipe: one document that describes a text-to-video system from clips to dollars.

`Recipe.load("v2_0", profile="tiny")` reads the YAML, lays the profile over it, and checks everything before anything
runs. Errors say what is wrong, where, and what to do about it.
"""

import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from ml import sections as s
from ml.shapes import Size, Strides, sizes_of

PACKAGED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used, with one line for each thing that is wrong."""


class Recipe(s.Section):
    """The whole document, sections in data-flow order."""

    name: s.Name
    profile: s.Name
    title: str
    generation: str
    seed: int
    corpus: s.Corpus
    curation: s.Curation
    dataset: s.Dataset
    text: s.Text
    autoencoder: s.Autoencoder
    model: s.MMDiT
    objective: s.RectifiedFlow
    stages: tuple[s.Stage, ...]
    sampling: s.Sampling
    evaluation: s.Evaluation
    compute: s.ComputeByStep
    budget_usd: s.PositiveFloat

    @property
    def id(self) -> str:
        """Name and profile, the folder and experiment name: `v2_0-tiny`."""
        return f"{self.name}-{self.profile}"

    @property
    def strides(self) -> Strides:
        """Pixels and frames per token."""
        return Strides(self.autoencoder.temporal_stride, self.autoencoder.spatial_stride, self.model.patch)

    @property
    def phases(self) -> tuple[s.AutoencoderStage | s.Stage, ...]:
        """Every training stage, the autoencoder's first."""
        return (*self.autoencoder.stages, *self.stages)

    def stage(self, name: str) -> s.Stage:
        """The transformer stage of this name; raises RecipeError with the nearest name."""
        found: s.Stage = _named(self.stages, name, "stages")
        return found

    def autoencoder_stage(self, name: str) -> s.AutoencoderStage:
        """The autoencoder stage of this name; raises RecipeError with the nearest name."""
        found: s.AutoencoderStage = _named(self.autoencoder.stages, name, "autoencoder.stages")
        return found

    def digest(self, *paths: str) -> str:
        """Digest of the named sections (`curation.keep`, `stages.stage1`, ...) in 16 hex digits."""
        chosen = {path: to_jsonable_python(self._section(path)) for path in paths}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def _section(self, path: str) -> Any:
        node: Any = self
        for part in path.split("."):
            node = _named(node, part, path) if isinstance(node, tuple) else getattr(node, part)
        return node

    def dump(self) -> str:
        """The resolved document as YAML, loadable again with `Recipe.parse`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A recipe from a resolved document."""
        return cls.validate_document(yaml.safe_load(text), "recipe")

    @classmethod
    def load(cls, name: str, profile: str = "tiny", folders: tuple[Path, ...] = ()) -> Self:
        """Read recipe `name` from the given folders or the packaged ones, with `profile` laid over it.

        Raises RecipeError naming the nearest recipe, profile or key.
        """
        path = find(name, folders)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RecipeError(f"{path.name} is not YAML: {error}") from error
        if not isinstance(document, dict):
            raise RecipeError(f"{path.name} holds no mapping: a recipe is a YAML document of sections")
        profiles = document.pop("profiles", {"paper": {}})
        if profile not in profiles:
            raise RecipeError(f"{name} has no profile {profile!r}{_nearest(profile, profiles)}")
        merged = _overlay(document, profiles[profile] or {})
        return cls.validate_document({**merged, "profile": profile}, path.name)

    @classmethod
    def validate_document(cls, document: dict[str, Any], where: str) -> Self:
        """Check a merged document; raises RecipeError with one readable line a problem."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise RecipeError(f"{where}:\n" + "\n".join(f"  {line}" for line in _explain(error, document))) from None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = [*self._shape_problems(), *self._name_problems(), *self._bucket_problems(), *self._model_problems()]
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def _shape_problems(self) -> list[str]:
        shapes = [
            (f"stages.{stage.name}", r, f) for stage in self.stages for r, cells in stage.buckets.items() for f in cells
        ]
        shapes += [(f"autoencoder.stages.{a.name}", a.resolution, a.frames) for a in self.autoencoder.stages]
        shapes.append(("sampling", self.sampling.resolution, self.sampling.frames))
        return [p for where, resolution, frames in shapes for p in self._shape_problem(where, resolution, frames)]

    def _shape_problem(self, where: str, resolution: str, frames: int) -> list[str]:
        strides, problems = self.strides, []
        try:
            bad = [z for z in sizes_of(resolution, strides.pixels).values() if not _divides(strides.pixels, z)]
        except ValueError as error:
            return [f"{where}: {error}"]
        if bad:
            down = Size(*(max(1, n // strides.pixels) * strides.pixels for n in (bad[0].height, bad[0].width)))
            why = f"autoencoder stride {strides.spatial} x patch {strides.patch}"
            problems.append(f"{where}: shape {bad[0]} is not divisible by {strides.pixels} ({why}); use {down}")
        if not strides.encodes(frames):
            low = max(0, frames - 1) // strides.temporal * strides.temporal + 1
            hint = f"use {low} or {low + strides.temporal}"
            problems.append(
                f"{where}: {frames} frames cannot be encoded at {strides.temporal} frames per latent; {hint}"
            )
        return problems

    def _name_problems(self) -> list[str]:
        problems = []
        tiers = [tier.name for tier in self.dataset.tiers]
        for stage in self.phases:
            if stage.tier not in tiers:
                problems.append(f"stage {stage.name}: no dataset tier {stage.tier!r}{_nearest(stage.tier, tiers)}")
        names = [stage.name for stage in self.phases]
        problems += [f"stage name {n!r} is used twice" for n in sorted({n for n in names if names.count(n) > 1})]
        scores = [*self.curation.scores, "duration_seconds"]
        thresholds = [self.curation.keep.thresholds, *(tier.thresholds for tier in self.dataset.tiers)]
        for key in sorted({k for t in thresholds for k in t if k not in scores}):
            problems.append(f"threshold on {key!r}, which curation.scores does not compute{_nearest(key, scores)}")
        if not self.stages:
            problems.append("stages: a recipe needs at least one training stage")
        if not (self.autoencoder.stages or self.autoencoder.weights_uri):
            problems.append("autoencoder: give stages to train it, or weights_uri to load it")
        if self.autoencoder.weights_uri and not self.autoencoder.stages and self.autoencoder.scale is None:
            problems.append("autoencoder.scale: weights_uri without stages needs it, as only training measures it")
        return problems

    def _bucket_problems(self) -> list[str]:
        """Latents are keyed by size and frames: two resolution names for the same ones would overwrite each other."""
        problems: list[str] = []
        names: dict[tuple[Size, int], str] = {}
        cells = {(r, frames): None for stage in self.stages for r, kinds in stage.buckets.items() for frames in kinds}
        for resolution, frames in cells:
            try:
                sizes = sizes_of(resolution, self.strides.pixels).values()
            except ValueError:  # _shape_problem has named it
                continue
            for size in sizes:
                first = names.setdefault((size, frames), resolution)
                if first != resolution:
                    problems.append(
                        f"buckets: {first!r} and {resolution!r} are both {size} at {frames} frames; use one name"
                    )
        return problems

    def _model_problems(self) -> list[str]:
        problems, model = [], self.model
        if model.width % model.heads:
            problems.append(f"model: width {model.width} is not divisible by {model.heads} heads")
        elif sum(model.rope_axes) != model.width // model.heads:
            problems.append(
                f"model: rope_axes sum to {sum(model.rope_axes)}, head size is {model.width // model.heads}"
            )
        problems += [
            f"evaluation.gate: unknown metric {rule.metric!r}; a VBench dimension needs evaluation.vbench_dimensions"
            for rule in self.evaluation.gate
            if rule.metric.startswith("vbench/")
            and rule.metric.removeprefix("vbench/") not in self.evaluation.vbench_dimensions
        ]
        return problems


def find(name: str, folders: tuple[Path, ...] = ()) -> Path:
    """File of a recipe, user folders first; raises RecipeError naming the nearest one."""
    known = available(folders)
    if name not in known:
        raise RecipeError(f"no recipe {name!r}{_nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def available(folders: tuple[Path, ...] = ()) -> dict[str, Path]:
    """Every recipe that can be loaded, by name; a user's own folder shadows the packaged one."""
    paths = [path for folder in (PACKAGED, *reversed(folders)) for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: path for path in paths}


def header(path: Path) -> str:
    """The comment block at the top of a recipe: what it trains, how long, for how much, and how to start it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    block = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in block)


def _divides(multiple: int, size: Size) -> bool:
    return size.height % multiple == 0 and size.width % multiple == 0


def _named(items: Any, name: str, where: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise RecipeError(f"{where} has no {name!r}{_nearest(name, [item.name for item in items])}")


def _nearest(word: str, words: Any) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _overlay(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge key by key, everything else replaces."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{k: _overlay(base[k], v) if k in base else v for k, v in over.items()}}
    return over


def _explain(error: ValidationError, document: Any) -> list[str]:
    lines: list[str] = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _siblings(problem["loc"])
            lines.append(f"{where}: unknown key{_nearest(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: required, and missing")
        else:
            lines += [f"{where}: {m}" if where else m for m in problem["msg"].removeprefix("Value error, ").split("\n")]
    return lines


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    """Keys that the schema knows where an unknown one was found."""
    model: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        inner = _model_of(field.annotation) if field else model
        model = inner or model
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `tuple[Stage, ...]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_of(arg) for arg in getattr(annotation, "__args__", ())]
    return next((model for model in reversed(found) if model), None)


def user_folders() -> tuple[Path, ...]:
    """Folders that hold a user's own recipes: `recipes/` below the working directory, when it exists."""
    folder = Path(os.getcwd()) / "recipes"
    return (folder,) if folder.is_dir() else ()
