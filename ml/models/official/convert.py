"""From official tensors to ours: checked on names and shapes alone, then done a few tensors at a time."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ml.architectures import Source
from ml.models.official.files import Header, Official
from ml.models.official.looks import looks_like
from ml.models.official.report import Entry, Report, hint
from ml.models.official.rules import Rules, State, Step, Target, rules_for

# Steps may need the other tensors of a block (q, k and v are fused from three), and never those of another one.
GROUP = re.compile(r"(?:double_blocks|single_blocks)\.\d+\.")
# Comparing a name with every known one takes milliseconds: enough for a misspelt name, too much for another network.
NEAREST_OF = 20


@dataclass(frozen=True)
class Arrived:
    """A tensor under our name, before it is read: dtype and shape, how it came about, and from which file names."""

    header: Header
    how: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """Weights held against a network: what becomes of every name, and everything needed to convert them."""

    official: Official
    rules: Rules
    arrived: Mapping[str, Arrived]
    report: Report

    @property
    def initialised(self) -> tuple[str, ...]:
        """Our names that have no source."""
        return tuple(entry.name for entry in self.report.having("initialised"))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Our tensors, read and converted group by group."""
        for names in groups(_kept(self.official.headers, self.rules)):
            yield from apply({name: self.official.read(name) for name in names}, self.rules.steps)[0].items()


def check(official: Official, target: Target, source: Source = "auto") -> Checked:
    """Hold weights against a network by names and shapes; nothing is read. Raises OfficialError as `rules_for` does."""
    rules = rules_for(official.headers, target, source)
    arrived, refused = arrive(official.headers, rules)
    entries = [*refused, *_dropped(official.headers, rules), *_judged(arrived, target)]
    entries += _lacking(arrived, {name for e in refused for name in e.sources}, rules, target)
    looks = looks_like(official.headers)
    bad = any(entry.status == "refused" for entry in entries)
    advice = hint(official.headers, target) if bad else ""
    report = Report(tuple(entries), looks.title if looks else "", rules.source, official.unwrapped, advice)
    return Checked(official, rules, arrived, report)


def arrive(headers: Mapping[str, Header], rules: Rules) -> tuple[dict[str, Arrived], list[Entry]]:
    """What the steps would make, run on tensors without content, and what they choke on."""
    arrived: dict[str, Arrived] = {}
    refused: list[Entry] = []
    for names in groups(_kept(headers, rules)):
        empty = {n: torch.empty(headers[n].shape, dtype=headers[n].dtype, device="meta") for n in names}
        try:
            made, trace = apply(empty, rules.steps)
        except (ValueError, RuntimeError) as error:  # sizes that cannot be split or viewed so
            refused += [Entry(name, "refused", f"{_shape(headers[name].shape)}: {error}", (name,)) for name in names]
            continue
        for name, tensor in made.items():
            how, sources = trace[name]
            arrived[name] = Arrived(Header(tensor.dtype, tuple(tensor.shape)), how, sources)
    return arrived, refused


def groups(names: Sequence[str]) -> list[list[str]]:
    """Names that must be converted together: blocks whose projections fuse or split, and every other name alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = GROUP.match(name)
        found.setdefault(match.group(0) if match else name, []).append(name)
    return list(found.values())


def apply(state: State, steps: Sequence[Step]) -> tuple[State, dict[str, tuple[str, tuple[str, ...]]]]:
    """Run steps on a group; returns the tensors, and for each the steps that made it and the names it came from."""
    trace: dict[str, tuple[str, tuple[str, ...]]] = {name: ("", (name,)) for name in state}
    for step in steps:
        after = step.apply(state)
        trace = {name: _traced(name, tensor, (state, after), step.how, trace) for name, tensor in after.items()}
        state = after
    return state, trace


def _traced(
    name: str,
    tensor: Tensor,
    states: tuple[State, State],
    how: str,
    trace: Mapping[str, tuple[str, tuple[str, ...]]],
) -> tuple[str, tuple[str, ...]]:
    before, after = states
    if name in before and before[name] is tensor:
        return trace[name]
    parents = [old for old, same in before.items() if same is tensor] or [name for _ in (0,) if name in before]
    if not parents:  # split or fused: from what vanished beside it
        vanished = [old for old in before if old not in after]
        parents = [old for old in vanished if _place(old) == _place(name)] or vanished
    hows = [part for part in (trace[parents[0]][0], how) if part]
    return ", then ".join(hows), tuple(dict.fromkeys(source for old in parents for source in trace[old][1]))


def _place(name: str) -> tuple[str, str]:
    """`a.attn.qkv.weight` -> (`a.attn`, `weight`)."""
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[0], kind


def _kept(headers: Mapping[str, Header], rules: Rules) -> list[str]:
    return [name for name in headers if _why(name, rules.dropped) is None]


def _why(name: str, patterns: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, name)), None)


def _dropped(headers: Mapping[str, Header], rules: Rules) -> list[Entry]:
    reasons = ((name, _why(name, rules.dropped)) for name in headers)
    return [Entry(name, "dropped", why, (name,)) for name, why in reasons if why is not None]


def _judged(arrived: Mapping[str, Arrived], target: Target) -> list[Entry]:
    """Used and converted where our name, shape and kind of number agree, refused elsewhere."""
    unknown = [name for name in arrived if name not in target.wanted]
    entries = []
    for name, made in arrived.items():
        given = made.sources[0] if len(made.sources) == 1 else name
        if name not in target.wanted:
            near = _nearest(name, target) if len(unknown) <= NEAREST_OF else ""
            entries.append(Entry(given, "refused", f"unknown name{near}", made.sources))
        elif made.header.shape != target.wanted[name]:
            shapes = f"shape {_shape(made.header.shape)}, {target.recipe} has {_shape(target.wanted[name])}"
            entries.append(Entry(name, "refused", shapes, made.sources))
        elif not made.header.dtype.is_floating_point or made.header.dtype.itemsize == 1:
            why = f"{made.header.dtype}: quantised weights cannot be imported, take the 16 or 32 bit ones"
            entries.append(Entry(name, "refused", why, made.sources))
        elif made.how or made.sources != (name,):
            origin = "" if made.sources == (name,) else f", from {', '.join(made.sources)}"
            entries.append(Entry(name, "converted", made.how + origin, made.sources))
        else:
            entries.append(Entry(name, "used", "", made.sources))
    return entries


def _lacking(arrived: Mapping[str, Arrived], choked: set[str], rules: Rules, target: Target) -> list[Entry]:
    """Ours without a source: initialised where the rules allow it, refused as missing elsewhere."""
    entries = []
    for name in target.wanted:
        if name in arrived or name in choked:
            continue
        why = _why(name, rules.initialised)
        missing = "missing: these weights lack it, and it cannot be guessed"
        entries.append(Entry(name, "refused", missing) if why is None else Entry(name, "initialised", why))
    return entries


def _nearest(name: str, target: Target) -> str:
    near = difflib.get_close_matches(name, list(target.wanted), n=1, cutoff=0.5)
    return f"; the nearest of {target.recipe} is {near[0]}" if near else ""


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
