"""Import of released autoencoder weights: a file the user placed in the workspace becomes a step like any other."""

from infra.storage import sha256_of
from ml.entry import Call, CallError


def import_autoencoder(call: Call) -> None:
    """Check the file that `autoencoder.weights_uri` names against the recipe's network and export it as our weights.

    The path is relative to the workspace. Raises CallError when it is not there, CheckpointMismatch when a name or a
    shape differs.
    """
    from ml.models.autoencoders.registry import load_released, save_autoencoder
    from ml.models.weights import Origin

    section = call.recipe.autoencoder
    path = call.workspace / str(section.weights_uri)
    if not path.is_file():
        raise CallError(
            f"autoencoder.weights_uri names {section.weights_uri}, which is not in {call.workspace}: place "
            "the released file there, or give the recipe autoencoder.stages to train its own"
        )
    autoencoder = load_released(section, path)
    save_autoencoder(call.out, autoencoder, section.net, Origin(call.recipe.id, "released"))
    parameters = sum(tensor.numel() for tensor in autoencoder.net.state_dict().values())
    facts = {"source": str(section.weights_uri), "source_sha256": sha256_of(path)}
    call.finish({"num_parameters": parameters}, facts=facts, data=["weights.safetensors", "model.json"])
