"""Released weights as steps: what the user placed in the workspace is checked, converted, and trained on from there.

`opensora weights import --dry-run` says beforehand whether a file fits. A source is a file, an index of shards or a
folder; its path is relative to the workspace.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ml.entry import Call, CallError

if TYPE_CHECKING:  # torch takes seconds to import
    from ml.weights import Wish


def import_autoencoder(call: Call) -> None:
    """Hold what `autoencoder.weights_uri` names against the recipe's autoencoder and write it as our weights.

    Raises CallError when it is not there, OfficialError when a name or a shape differs.
    """
    from ml.weights import Wish

    uri, instead = str(call.recipe.autoencoder.weights_uri), "give the recipe autoencoder.stages to train its own"
    _import(call, Wish(_there(call, "autoencoder.weights_uri", uri, instead), call.recipe, "autoencoder"), uri)


def import_transformer(call: Call) -> None:
    """Hold what `pretrained.uri` names against the recipe's transformer and write it for the first stage to start from.

    Raises CallError when it is not there, or the recipe names none; OfficialError when a name or a shape differs.
    """
    from ml.weights import Wish

    wanted = call.recipe.pretrained
    if wanted is None:
        raise CallError(f"{call.recipe.id} has no section pretrained: its first stage starts from its seed")
    path = _there(call, "pretrained.uri", wanted.uri, "set `pretrained: null` to train from the recipe's seed")
    _import(call, Wish(path, call.recipe, "transformer", wanted.source), wanted.uri)


def _there(call: Call, key: str, uri: str, instead: str) -> Path:
    path = call.workspace / uri
    if not path.exists():
        raise CallError(f"{key} names {uri}, which is not in {call.workspace}: place it there, or {instead}")
    return path


def _import(call: Call, wish: "Wish", uri: str) -> None:
    from ml.weights import RECORD, check_weights, place

    checked = check_weights(wish)
    digest = checked.official.sha256()
    place(call.out, wish, checked, digest)
    parameters = sum(math.prod(made.header.shape) for made in checked.arrived.values())
    facts = {"source": uri, "source_sha256": digest, "names": checked.report.counts()}
    call.finish({"num_parameters": parameters}, facts=facts, data=["weights.safetensors", "model.json", RECORD])
