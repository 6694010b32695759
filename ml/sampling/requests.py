"""What is asked of a generator: a prompt, what it is given, and how; one file holds many."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml.diffusion.mask_strategy import split_tail

FIELDS = ("prompt", "references", "condition", "mask_strategy")


class RequestError(ValueError):
    """A file of prompts that cannot be read, or a request that makes no sense, with what to change."""


@dataclass(frozen=True)
class Request:
    """One clip to make.

    `references` are pictures or videos. `condition` is a kind of the network's generation (`i2v_head`; None is the
    recipe's own), `mask_strategy` the six-field language of 1.1 and 1.2 (`ml/diffusion/mask_strategy.py`). A prompt may
    end in a JSON object that names both, as in 1.1.
    """

    prompt: str
    references: tuple[Path, ...] = ()
    condition: str | None = None
    mask_strategy: str = ""

    @classmethod
    def of(cls, entry: Any, folder: Path) -> "Request":
        """From a text, or a mapping of the fields; relative references lie in `folder`.

        Raises RequestError, and MaskStrategyError for a tail that cannot be read.
        """
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str) or set(fields) - set(FIELDS):
            raise RequestError(f"a prompt is a text, or a mapping with {', '.join(FIELDS)}; got {entry!r}")
        _check_types(fields)
        wish = split_tail(fields["prompt"])
        named = wish.references if wish.references is not None else tuple(fields.get("references", ()))
        found = tuple(folder / name for name in named)
        for path in found:
            if not path.is_file():
                raise RequestError(f"reference {path} does not exist")
        strategy = wish.strategy if wish.strategy is not None else fields.get("mask_strategy", "")
        return cls(wish.text.strip(), found, fields.get("condition"), strategy)


def read_requests(path: Path) -> list[Request]:
    """The requests of a JSON list; raises RequestError for anything else."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    if not entries or not isinstance(entries, list):
        raise RequestError(f"{path} must hold a JSON list of prompts, each a text or a mapping")
    return [Request.of(entry, path.parent) for entry in entries]


def _check_types(fields: dict[str, Any]) -> None:
    """Raise RequestError for a field that is of another type than its own."""
    references, where = fields.get("references", ()), f"prompt {fields['prompt']!r}"
    if not isinstance(references, list | tuple) or not all(isinstance(name, str) for name in references):
        raise RequestError(f"{where}: references is a list of file names, got {references!r}")
    strategy, condition = fields.get("mask_strategy", ""), fields.get("condition")
    if not isinstance(strategy, str):
        raise RequestError(f"{where}: mask_strategy is a text such as '0;0,1,0,-1,1', got {strategy!r}")
    if not isinstance(condition, str | None):
        raise RequestError(f"{where}: condition is a text such as 'i2v_head', got {condition!r}")
