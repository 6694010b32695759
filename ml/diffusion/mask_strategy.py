"""References in the language of 1.1 and 1.2: which frames of which reference go where, and how much they are edited.

A strategy is groups joined by `;`, each `loop,reference,reference_start,target_start,length,edit_ratio` with defaults
`0,0,0,0,1,0`, all counted in latent frames; negative starts count from the end. `0` starts from a picture, `0,0,0,-8,8`
extends a video backwards, `0;0,1,0,-1,1` joins two pictures, `0,0,0,0,32,0.4` edits (docs/commands.md, 1.1). A prompt
may end in `{"reference_path": "a;b", "mask_strategy": "0"}`, and may change over loops: `|0|a cat|2|a dog`.

Letters: C latent channels, t h w latent grid, f latent frames of a reference.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEFAULTS = ("0", "0", "0", "0", "1", "0")
TAIL_KEYS = ("reference_path", "mask_strategy")


class MaskStrategyError(ValueError):
    """A mask strategy, or a prompt that carries one, that cannot be followed."""


@dataclass(frozen=True)
class Placement:
    """One group: `length` latents of a reference, from its `reference_start`, stand at `target_start` of a loop.

    `edit_ratio` 0 keeps them, 1 makes them anew. A group that `selects` says which part of its reference it takes; one
    that does not (`0`, `0,1`) takes a picture, or a video no longer than the clip.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0
    selects: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Wish:
    """A prompt and what its tail asked for; None where it said nothing."""

    text: str
    references: tuple[str, ...] | None = None
    strategy: str | None = None


def parse(strategy: str) -> tuple[Placement, ...]:
    """The groups of a strategy, none for an empty one; raises MaskStrategyError for unknown syntax."""
    return tuple(_placement(group) for group in strategy.split(";")) if strategy else ()


def check(placements: Sequence[Placement], loops: int, num_references: int) -> None:
    """Raise MaskStrategyError for a group of a loop or reference that there is not, and a reference of no group."""
    late = [group.loop for group in placements if group.loop >= loops]
    if late:
        raise MaskStrategyError(
            f"mask strategy places a reference in loop {late[0]} of {loops} (counted from 0): raise sampling.loops, or "
            "leave the group out"
        )
    used = {group.reference for group in placements}
    for number in sorted(used):
        if number >= num_references:
            raise MaskStrategyError(f"mask strategy asks for reference {number}, {num_references} were given")
    unused = [number for number in range(num_references) if number not in used]
    if unused:
        raise MaskStrategyError(
            f"no group of the mask strategy places reference {unused[0]} of {num_references} (counted from 0): give it "
            "a group, or leave it out"
        )


def latents_used(placements: Sequence[Placement], reference: int, clip: int, align: int | None) -> int | None:
    """How many latents from its start a reference has to be read to for a clip of `clip` latents; None = to its end.

    A start that counts from the end needs all of it. A group that selects nothing needs one latent more than the clip
    has, which shows that the reference is too long.
    """
    groups = [group for group in placements if group.reference == reference]
    if any(group.reference_start < 0 for group in groups):
        return None
    # An aligned start moves up by half of `align` at most, and only where a whole `align` follows it.
    room = 2 * (align or 0)
    return max(g.reference_start + min(g.length, clip) + room if g.selects else clip + 1 for g in groups)


def split_tail(prompt: str) -> Wish:
    """A prompt without its JSON tail, and what the tail said; raises MaskStrategyError when it cannot be read."""
    text, brace, tail = prompt.partition("{")
    if not brace:
        return Wish(prompt)
    try:
        found = json.loads(brace + tail)
    except json.JSONDecodeError as error:
        raise MaskStrategyError(f"the tail of {prompt!r} is no JSON object: {error}") from error
    unknown = sorted(set(found) - set(TAIL_KEYS))
    if unknown:
        raise MaskStrategyError(f"the tail of {prompt!r} says {', '.join(unknown)}: known are {', '.join(TAIL_KEYS)}")
    wrong = sorted(name for name, value in found.items() if not isinstance(value, str))
    if wrong:
        raise MaskStrategyError(f"the tail of {prompt!r}: {', '.join(wrong)} must be a text")
    references, strategy = (found.get(name) for name in TAIL_KEYS)
    paths = None if references is None else tuple(path for path in references.split(";") if path)
    return Wish(text, paths, strategy)


def loop_prompt(prompt: str, loop: int) -> str:
    """The text of a loop: `|0|a|2|b` is a in loops 0 and 1, b from 2 on; any other prompt is every loop's.

    Raises MaskStrategyError when loops are no rising numbers, each with a text.
    """
    if not prompt.startswith("|0|"):
        return prompt
    parts = prompt.split("|")[1:]
    if len(parts) % 2 or not all(number.isdecimal() for number in parts[::2]):
        raise MaskStrategyError(f"{prompt!r} must read |0|text|2|text: loop numbers, each with its text")
    starts = [int(number) for number in parts[::2]]
    if starts != sorted(set(starts)):
        raise MaskStrategyError(f"{prompt!r} names loops {starts}, which must rise")
    return [text for start, text in zip(starts, parts[1::2], strict=True) if start <= loop][-1].strip()


def apply(
    latent: Tensor,
    references: Sequence[Tensor],
    placements: Sequence[Placement],
    loop: int = 0,
    align: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A copy of latents [C,t,h,w] with the references [C,f,h,w] of a loop placed, and edit ratios [t] (1 = made).

    Starts are rounded to multiples of `align` (5 in 1.2: what the autoencoder decodes together). What runs over the end
    of the clip or of the reference is cut. Raises MaskStrategyError for a reference that was not given, a start outside
    the clip or the reference, a length above the clip's, a reference of another size, and one longer than the clip of
    which no part is selected.
    """
    placed, mask = latent.clone(), torch.ones(latent.shape[1], device=latent.device)
    for group in placements:
        if group.loop != loop:
            continue
        reference = _reference(latent, references, group)
        start = _start(group.reference_start, reference.shape[1], align, "reference_start")
        target = _start(group.target_start, latent.shape[1], align, "target_start")
        length = min(group.length, latent.shape[1] - target, reference.shape[1] - start)
        placed[:, target : target + length] = reference[:, start : start + length].to(latent)
        mask[target : target + length] = group.edit_ratio
    return placed, mask


def continuation(reference: int, loop: int, length: int, edit_ratio: float = 0.0) -> Placement:
    """The group that starts a loop with the last `length` latents of the clip before, encoded as that reference."""
    return Placement(loop, reference, -length, 0, length, edit_ratio)


def loop_frames(frames: int, loops: int, shared: int) -> int:
    """Frames of a film of loops that share `shared` frames with the one before: n k - (k - 1) c."""
    return frames * loops - (loops - 1) * shared


def _placement(group: str) -> Placement:
    fields = group.split(",")
    if len(fields) > len(DEFAULTS):
        raise MaskStrategyError(f"mask strategy {group!r} has {len(fields)} fields: there are {len(DEFAULTS)}")
    # From the third field on a group says which part of its reference it takes.
    selects = len(fields) > 2
    fields = [*fields, *DEFAULTS[len(fields) :]]
    try:
        loop, reference, reference_start, target_start, length = (int(field) for field in fields[:5])
        edit_ratio = float(fields[5])
    except ValueError as error:
        raise MaskStrategyError(
            f"mask strategy {group!r} must read loop,reference,reference_start,target_start,length,edit_ratio: {error}"
        ) from error
    if loop < 0 or reference < 0 or length < 1 or not 0 <= edit_ratio <= 1:
        raise MaskStrategyError(
            f"mask strategy {group!r}: loop and reference count from 0, length from 1, edit_ratio lies in 0..1"
        )
    return Placement(loop, reference, reference_start, target_start, length, edit_ratio, selects)


def _reference(latent: Tensor, references: Sequence[Tensor], group: Placement) -> Tensor:
    if group.reference >= len(references):
        raise MaskStrategyError(f"mask strategy asks for reference {group.reference}, {len(references)} were given")
    if group.length > latent.shape[1]:
        raise MaskStrategyError(f"mask strategy places {group.length} latents in a clip of {latent.shape[1]}")
    reference = references[group.reference]
    if (reference.shape[0], *reference.shape[2:]) != (latent.shape[0], *latent.shape[2:]):
        raise MaskStrategyError(f"reference {tuple(reference.shape)} does not fit the clip's {tuple(latent.shape)}")
    if not group.selects and reference.shape[1] > latent.shape[1]:
        raise MaskStrategyError(
            f"reference {group.reference} has {reference.shape[1]} latent frames or more, the clip {latent.shape[1]}: "
            "cut it, sample more frames, or select a part of it with loop,reference,reference_start,target_start,length"
        )
    return reference


def _start(start: int, frames: int, align: int | None, name: str) -> int:
    """A start in 0..frames-1: negative ones from the end, rounded to the nearest multiple of `align` within it."""
    found = frames + start if start < 0 else start
    if not 0 <= found < frames:
        raise MaskStrategyError(f"mask strategy: {name} {start} lies outside of {frames} latent frames")
    if align is None:
        return found
    whole = found // align
    if found % align > align / 2 and whole < frames // align - 1:
        whole += 1
    return whole * align
