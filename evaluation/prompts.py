"""Prompt sets: texts a person wrote to ask a model for, each with an identifier and tags, as one YAML file a set.

A set has a digest over identifiers and texts, so that two reports can tell whether they asked the same things.
"""

import hashlib
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from ml.section import Name, Section

PACKAGED = Path(__file__).parent / "prompts"


class PromptError(ValueError):
    """A prompt set that does not exist or cannot be used, with what is wrong in it."""


class Prompt(Section):
    """One text, with a stable identifier and tags that say what it tests."""

    id: Name
    text: Annotated[str, Field(min_length=3)]
    tags: Annotated[tuple[Name, ...], Field(min_length=1)]


class PromptSet(Section):
    """A named, ordered set of prompts."""

    name: Name
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]

    @property
    def digest(self) -> str:
        """16 hex digits over identifiers and texts, in order; tags may change without changing what is asked."""
        lines = (f"{prompt.id}\x1f{prompt.text}" for prompt in self.prompts)
        return hashlib.sha256("\x1e".join(lines).encode()).hexdigest()[:16]

    def first(self, num_prompts: int) -> "PromptSet":
        """The first prompts only, which is another set with another digest; raises PromptError when there are fewer."""
        if num_prompts > len(self.prompts):
            raise PromptError(f"prompt set {self.name} has {len(self.prompts)} prompts, {num_prompts} were asked for")
        return self.model_copy(update={"prompts": self.prompts[:num_prompts]})

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [prompt.text for prompt in self.prompts]


def load(name: str, folder: Path = PACKAGED) -> PromptSet:
    """Read the prompt set `name`; raises PromptError for an unknown name, bad YAML, or an identifier used twice."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise PromptError(f"no prompt set {name!r} in {folder.name}/; known: {known}")
    try:
        prompts = PromptSet.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise PromptError(f"{path.name} is not a prompt set: {error}") from error
    ids = [prompt.id for prompt in prompts.prompts]
    if repeated := sorted({i for i in ids if ids.count(i) > 1}):
        raise PromptError(f"{path.name}: identifier(s) used twice: {', '.join(repeated)}")
    return prompts
