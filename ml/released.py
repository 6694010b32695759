"""Released weights as steps: what the user placed in the workspace is checked, converted, and trained on from there.

`opensora weights import --dry-run` says beforehand whether a file fits. A source is a file, an index of shards or a
folder; its path is relative to the workspace.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from infra.registry import Registry
from ml.entry import Call, CallError

if TYPE_CHECKING:  # torch takes seconds to import
    from ml.weights import Wish


def source_fingerprint(workspace: Path, uri: str) -> str:
    """Digest of name, size and change time of every file that released weights are read from.

    Cheap enough to ask for at every look, so that a file that was replaced makes its import stale. Nothing is raised
    for weights that are not there (yet): the import itself says so.
    """
    path = workspace / uri
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else _with_shards(path)
    facts = [(file.relative_to(path.parent).as_posix(), *_size_and_time(file)) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def import_autoencoder(call: Call) -> None:
    """Hold what `autoencoder.weights_uri` names against the recipe's autoencoder and write it as our weights.

    Raises CallError when it is not there, OfficialError when a name or a shape differs.
    """
    from ml.weights import Wish

    uri, instead = str(call.recipe.autoencoder.weights_uri), "give the recipe autoencoder.stages to train its own"
    _import(call, Wish(_there(call, "autoencoder.weights_uri", uri, instead), call.recipe, "autoencoder"), uri)


def import_transformer(call: Call) -> None:
    """Hold what `pretrained.uri` names against the recipe's transformer and write it as our weights.

    The first stage starts from them; a recipe without stages samples and judges them.
    Raises CallError when it is not there, or the recipe names none; OfficialError when a name or a shape differs.
    """
    from ml.weights import Wish

    wanted = call.recipe.pretrained
    if wanted is None:
        raise CallError(f"{call.recipe.id} has no section pretrained: its first stage starts from its seed")
    path = _there(call, "pretrained.uri", wanted.uri, "set `pretrained: null` to train from the recipe's seed")
    _import(call, Wish(path, call.recipe, "transformer", wanted.source, wanted.licence, wanted.url), wanted.uri)


def _there(call: Call, key: str, uri: str, instead: str) -> Path:
    path = call.workspace / uri
    if not path.exists():
        raise CallError(f"{key} names {uri}, which is not in {call.workspace}: place it there, or {instead}")
    return path


def _import(call: Call, wish: "Wish", uri: str) -> None:
    from ml.weights import check_weights, imported_from, place

    checked = check_weights(wish)
    digest = checked.official.sha256()
    place(call.out, wish, checked, digest)
    parameters = sum(math.prod(made.header.shape) for made in checked.arrived.values())
    facts = {
        "source": uri,
        "source_sha256": digest,
        "licence": wish.licence,
        "url": wish.url,
        "layout": checked.report.source,
        "names": checked.report.counts(),
    }
    if call.log.uri:
        facts["mlflow_model"] = Registry(str(call.log.uri)).record(imported_from(wish, checked, call.out, digest))
    # Where weights come from is written in import.json; what they are is not: a licence makes no stage stale.
    call.finish({"num_parameters": parameters}, facts=facts, data=["weights.safetensors", "model.json"])


def _with_shards(path: Path) -> list[Path]:
    """A file, and what it lists when it is an index of shards."""
    if not path.name.endswith(".index.json") or not path.is_file():
        return [path]
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, LookupError, TypeError, AttributeError):
        return [path]  # the import says what is wrong with it
    return [path, *sorted(path.parent / str(shard) for shard in set(shards))]


def _size_and_time(path: Path) -> tuple[int, int]:
    if not path.is_file():
        return (0, 0)
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns)
