"""Released autoencoder weights as a step: what the user placed in the workspace is checked and converted.

`opensora weights import --part autoencoder --dry-run` says beforehand whether a file fits.
"""

import math

from ml.entry import Call, CallError


def import_autoencoder(call: Call) -> None:
    """Check what `autoencoder.weights_uri` names against the recipe's network and write it as our weights.

    It may be a file, an index of shards or a folder; the path is relative to the workspace. Raises CallError when it
    is not there, OfficialError when a name or a shape differs.
    """
    from ml.weights import RECORD, Wish, check_weights, place

    uri = str(call.recipe.autoencoder.weights_uri)
    path = call.workspace / uri
    if not path.exists():
        raise CallError(
            f"autoencoder.weights_uri names {uri}, which is not in {call.workspace}: place "
            "the released file there, or give the recipe autoencoder.stages to train its own"
        )
    wish = Wish(path, call.recipe, "autoencoder")
    checked = check_weights(wish)
    digest = checked.official.sha256()
    place(call.out, wish, checked, digest)
    parameters = sum(math.prod(made.header.shape) for made in checked.arrived.values())
    facts = {"source": uri, "source_sha256": digest, "names": checked.report.counts()}
    call.finish({"num_parameters": parameters}, facts=facts, data=["weights.safetensors", "model.json", RECORD])
