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
from ml.architectures import MMDiT, Model, OpenSoraV12Net, OpenSoraV13Net
from ml.methods import engine_problems
from ml.processes import KINDS, SAMPLED_KINDS, Objective, Sampling, check_solver, network_problems, sampling_problems
from ml.section import Name, PositiveFloat, Section
from ml.shapes import MICRO_FRAMES, Size, Strides, size_of, sizes_of

# Metrics of a report (evaluation/report.py) whatever the recipe; more follow from its stages and VBench dimensions.
REPORTED = (
    *("loss/held_out", "loss/untrained"),
    *(f"reconstruction/{name}" for name in ("psnr", "ssim", "lpips", "psnr_mean_frame", "psnr_own_mean_frame")),
    *(f"preference/{name}" for name in ("visual_quality", "prompt_adherence", "motion", "wins")),
)

PACKAGED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used, with one line for each thing that is wrong."""


class Recipe(Section):
    """The whole document, sections in data-flow order."""

    name: Name
    profile: Name
    title: str
    generation: str
    seed: int
    corpus: s.Corpus
    curation: s.Curation
    dataset: s.Dataset
    text: s.Text
    autoencoder: s.Autoencoder
    model: Model
    objective: Objective
    pretrained: s.Pretrained | None = None
    stages: tuple[s.Stage, ...]
    sampling: Sampling
    evaluation: s.Evaluation
    compute: s.ComputeByStep
    budget_usd: PositiveFloat

    @property
    def id(self) -> str:
        """Name and profile, the folder and experiment name: `v2_0-tiny`."""
        return f"{self.name}-{self.profile}"

    @property
    def strides(self) -> Strides:
        """Pixels and frames per token."""
        pads = not isinstance(self.model, MMDiT)
        return Strides(self.autoencoder.law, self.autoencoder.spatial_stride, self.model.patch, pads)

    @property
    def network(self) -> Model:
        """The model section with the sizes that follow from the text encoder and the autoencoder filled in."""
        text, channels = self.text, self.autoencoder.latent_channels
        if isinstance(self.model, MMDiT):
            token = channels * self.model.patch**2
            sizes = {"in_channels": token, "vec_in_dim": text.pooled_dim, "context_in_dim": text.context_dim}
        else:
            sizes = {
                "in_channels": channels,
                "caption_channels": text.context_dim,
                "model_max_length": text.max_tokens,
            }
        return self.model.model_copy(update=sizes)

    @property
    def told_guidance(self) -> float | None:
        """The guidance scale that a guidance-distilled network is told; None for any other."""
        distilled = isinstance(self.model, MMDiT) and self.model.guidance_embed
        return self.sampling.guidance_text if distilled else None

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
        problems = [*self._shape_problems(), *self._name_problems(), *self._weights_problems(), *self._model_problems()]
        problems += [*self._condition_problems(), *self._process_problems(), *self._autoencoder_problems()]
        problems += self._gate_problems()
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
            hint = "use {} or {}".format(*strides.nearest(frames))
            problems.append(f"{where}: {frames} frames cannot be encoded by {self.autoencoder.kind}; {hint}")
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
        if not (self.stages or self.pretrained):
            problems.append("stages: give a training stage, or pretrained weights to use as they are")
        return problems

    def _weights_problems(self) -> list[str]:
        """Where the autoencoder comes from, and what its stages may train."""
        autoencoder, problems = self.autoencoder, []
        if not (autoencoder.stages or autoencoder.weights_uri):
            problems.append("autoencoder: give stages to train it, or weights_uri to load it")
        if autoencoder.weights_uri and not autoencoder.stages and autoencoder.latent is None:
            problems.append("autoencoder.latent: weights_uri without stages needs it, as only training measures it")
        for stage in autoencoder.stages:
            if stage.part != "all" and autoencoder.kind != "opensora_v1_2":
                where = f"autoencoder.stages.{stage.name}"
                problems.append(f"{where}: {autoencoder.kind} has no {stage.part} part to train")
        for name in ("mean", "std"):
            given = len(getattr(autoencoder.latent, name)) if autoencoder.latent else 0
            if given not in (0, autoencoder.latent_channels):
                problems.append(
                    f"autoencoder.latent.{name}: {given} values for {autoencoder.latent_channels} latent channels"
                )
        return problems

    def _model_problems(self) -> list[str]:
        model = self.model
        if model.hidden_size % model.num_heads:
            return [f"model: hidden_size {model.hidden_size} is not divisible by {model.num_heads} heads"]
        return []

    def _condition_problems(self) -> list[str]:
        """Kinds of given frames are those of the network's generation; the solver is one of the objective's."""
        known, problems = KINDS[self.model.conditioning], []
        for stage in self.stages:
            for kind in stage.conditions:
                if kind not in known:
                    where = f"stages.{stage.name}.conditions"
                    problems.append(f"{where}: {self.model.kind} knows no {kind!r}{_nearest(kind, known)}")
        sampled = SAMPLED_KINDS[self.model.conditioning]
        if self.sampling.condition not in sampled:
            near = _nearest(self.sampling.condition, sampled)
            problems.append(f"sampling.condition: {self.model.kind} knows no {self.sampling.condition!r}{near}")
        try:
            check_solver(self.objective, self.sampling)
        except ValueError as error:
            problems.append(f"sampling.solver: {error}")
        return problems

    def _process_problems(self) -> list[str]:
        """Network, objective and sampling are of one generation, and every setting has an effect."""
        problems = [*network_problems(self.objective, self.model), *self._loop_problems()]
        for stage in self.stages:
            found = engine_problems(stage.engine, self.model, stage.lora)
            problems += [f"stages.{stage.name}.{problem}" for problem in found]
        problems += sampling_problems(self.objective, self.model, self.sampling)
        if isinstance(self.model, MMDiT) and self.model.guidance_embed and self.stages:
            problems.append(
                "model.guidance_embed: a guidance-distilled network is sampled, not trained: leave the stages out and "
                "give pretrained weights, or set it to false"
            )
        try:
            size_of(self.sampling.resolution, self.strides.pixels, self.sampling.aspect)
        except ValueError as error:
            problems.append(f"sampling: {error}")
        return problems

    def _loop_problems(self) -> list[str]:
        """Latents that a loop is given are fewer than a clip's, and encoded together."""
        sampling, strides = self.sampling, self.strides
        given, clip = sampling.loop_latents, strides.latent_frames(sampling.frames)
        if sampling.loops == 1 or not given:
            return []
        if given >= clip:
            return [f"sampling.loop_latents: {given} of a clip's {clip} latent frames leave nothing to make"]
        if sampling.align and given % sampling.align:
            return [f"sampling.loop_latents: {given} is no multiple of sampling.align {sampling.align}"]
        if not any(strides.encodes(n) and strides.latent_frames(n) == given for n in range(1, sampling.frames)):
            return [f"sampling.loop_latents: {self.autoencoder.kind} encodes no clip to {given} latent frames"]
        return []

    def _autoencoder_problems(self) -> list[str]:
        """The autoencoder shortens time as `Strides` has it, and its stages' losses and lengths are its own."""
        net, problems = self.autoencoder.net, []
        if isinstance(net, OpenSoraV12Net | OpenSoraV13Net) and net.micro_frame_size != MICRO_FRAMES:
            problems.append(
                f"autoencoder.net.micro_frame_size: {net.micro_frame_size}; lengths count on {MICRO_FRAMES}"
            )
        if isinstance(net, OpenSoraV12Net) and sum(net.temporal_downsample) != 2:
            problems.append("autoencoder.net.temporal_downsample: must halve time twice, as lengths count on")
        if isinstance(net, OpenSoraV13Net) and not net.temporal_overlap:
            problems.append("autoencoder.net.temporal_overlap: lengths count on windows that share a frame")
        for stage in self.autoencoder.stages:
            where, loss = f"autoencoder.stages.{stage.name}", stage.loss
            foreign = [name for name in ("latent", "identity") if getattr(loss, name) and net.kind != "opensora_v1_2"]
            foreign += ["kl"] if loss.kl and net.kind == "dc_ae" else []
            problems += [f"{where}.loss.{name}: {net.kind} has no such term; set it to 0" for name in foreign]
            lengths = [n for n in range(1, stage.frames + 1) if self.strides.encodes(n)]
            if stage.random_frames and len(lengths) < 2:
                problems.append(f"{where}.random_frames: only {lengths} of its {stage.frames} frames can be encoded")
        return problems

    def _gate_problems(self) -> list[str]:
        dimensions = self.evaluation.vbench_dimensions
        known = [*REPORTED, *(f"loss/stage/{name}" for name in [p.name for p in self.stages] or ["pretrained"])]
        known += [f"vbench/{name}" for name in (*dimensions, *(("total",) if len(set(dimensions)) == 16 else ()))]
        named = [n for rule in self.evaluation.gate for n in (rule.metric, rule.relative_to) if n is not None]
        return [
            f"evaluation.gate: unknown metric {name!r}{_nearest(name, known)}; a VBench dimension needs "
            "evaluation.vbench_dimensions"
            for name in named
            if name not in known
        ]


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
        parts, known = _place(problem["loc"])
        where = ".".join(parts)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{_nearest(parts[-1], known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: required, and missing")
        else:
            lines += [f"{where}: {m}" if where else m for m in problem["msg"].removeprefix("Value error, ").split("\n")]
    return lines


def _place(loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The keys that lead to a problem, without pydantic's names of union members, and the keys known where it lies."""
    model: Any = Recipe
    choices: dict[str, Any] = {}
    parts = []
    for number, part in enumerate(loc):
        if str(part) in choices:  # the name of a union's member
            model, choices = choices[str(part)], {}
            continue
        parts.append(str(part))
        if isinstance(part, str) and number < len(loc) - 1 and part in model.model_fields:
            found = _models_of(model.model_fields[part].annotation)
            model = found[0] if found else model
            choices = {kind.model_fields["kind"].default: kind for kind in found} if len(found) > 1 else {}
    return parts, list(model.model_fields)


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation such as `tuple[Stage, ...]`, `Section | None` or a union by kind."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_of(arg)]


def user_folders() -> tuple[Path, ...]:
    """Folders that hold a user's own recipes: `recipes/` below the working directory, when it exists."""
    folder = Path(os.getcwd()) / "recipes"
    return (folder,) if folder.is_dir() else ()
