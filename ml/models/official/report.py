"""What becomes of every name: used, converted, dropped, initialised or refused, and what the refusals mean."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ml.models.official.files import Header
from ml.models.official.looks import STDIT3, STDIT3_WINDOWS, Looks, looks_like, starts
from ml.models.official.rules import Target

Status = Literal["used", "converted", "dropped", "initialised", "refused"]
STATUSES: tuple[Status, ...] = ("used", "converted", "dropped", "initialised", "refused")
BLOCK = re.compile(r"(\w*(?:blocks|transformer_blocks|stages))\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One name of ours (or of the file, when it is dropped or refused as unknown), and what becomes of it and why."""

    name: str
    status: Status
    how: str = ""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Every name, what the weights look like, by which rules they were read, and what to do if they do not fit."""

    entries: tuple[Entry, ...]
    looks: str
    source: str
    unwrapped: tuple[str, ...] = ()
    hint: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing was refused."""
        return not self.having("refused")

    def having(self, status: Status) -> list[Entry]:
        """The entries of one status."""
        return [entry for entry in self.entries if entry.status == status]

    def counts(self) -> dict[str, int]:
        """Status -> number of names, in reading order; statuses that never occur are left out."""
        found = Counter(entry.status for entry in self.entries)
        return {status: found[status] for status in STATUSES if found[status]}

    def summary(self) -> str:
        """One line: `28 used, 2 converted (these look like PixArt-alpha, read as pixart_alpha)`."""
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items()) or "no names at all"
        unwrapped = f"; unwrapped: {', '.join(self.unwrapped)}" if self.unwrapped else ""
        return f"{counts} (looks like {self.looks or 'nothing familiar'}, read as {self.source}){unwrapped}"

    def groups(self) -> list[tuple[Status, str, str, int]]:
        """Rows for a table: (status, name with block numbers as `*`, how, how many), entries that say the same as one.

        Tensors that are simply used are left to the summary.
        """
        rows = Counter(
            (entry.status, BLOCK.sub(r"\1.*.", entry.name), _starred(entry.how))
            for entry in self.entries
            if entry.status != "used"
        )
        ordered = sorted(rows.items(), key=lambda item: -STATUSES.index(item[0][0]))
        return [(status, name, how, number) for (status, name, how), number in ordered]

    def to_dict(self) -> dict[str, Any]:
        """For `import.json`: everything but the names that are simply used."""
        told = [entry for entry in self.entries if entry.status != "used"]
        rows = [{"name": e.name, "status": e.status, "how": e.how, "sources": list(e.sources)} for e in told]
        return {"looks": self.looks, "source": self.source, "unwrapped": list(self.unwrapped), "names": rows}


def hint(found: Mapping[str, Header], target: Target) -> str:
    """What to do about weights that do not fit: the recipe, part or profile that they belong to."""
    have, want = looks_like(found), looks_like(_announced(target.wanted))
    if have is None:
        return f"nothing in these names is familiar; {target.recipe} wants {_title(want, target)}"
    if want is None or (have != want and not starts(have, want.kind)):
        return _other_generation(have, want, target)
    sizes = _sizes(found), _sizes(_announced(target.wanted))
    if sizes[0] != sizes[1]:
        return (
            f"these look like {have.title} of another size ({sizes[0]}; {target.recipe} has {sizes[1]}): "
            "choose the profile they were made for (`paper` has the published sizes)"
        )
    return f"these look like {have.title}, but names or shapes differ: a damaged or changed file"


def _other_generation(have: Looks, want: Looks | None, target: Target) -> str:
    text = f"these look like {have.title}; {target.recipe} wants {_title(want, target)}"
    if want is not None and have.part != want.part:
        return f"{text}: pass --part {have.part}"
    if have is STDIT3 and want is STDIT3_WINDOWS:
        return f"{text}. Import them with --recipe {have.recipe}, or start 1.3 from them with --source opensora_4ch"
    return f"{text}. Import them with --recipe {have.recipe}" if have.recipe else text


def _title(looks: Looks | None, target: Target) -> str:
    return looks.title if looks else f"a network of kind {target.kind}"


def _announced(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Header]:
    return {name: Header(torch.float32, shape) for name, shape in wanted.items()}


def _sizes(found: Mapping[str, Header]) -> str:
    """Depth and the dimension that occurs most: enough to tell a tiny network from a published one."""
    depth = len({match[2] for name in found if (match := BLOCK.search(name))})
    dimensions = Counter(size for header in found.values() for size in header.shape if size > 1)
    width = max(dimensions, key=lambda size: (dimensions[size], size), default=0)
    return f"{depth} deep, {width} wide"


def _starred(how: str) -> str:
    return BLOCK.sub(r"\1.*.", how)
