"""Full tensors by name in safetensors files, one file a rank; read lazily, from however many files there are.

masters-00000-of-00002.safetensors  masters-00001-of-00002.safetensors   each name lies in one of them
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.storage import sha256_of


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file to the disk itself, not only to its cache, and return the sha256 of what can be read back."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    return sha256_of(path)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of the files `{kind}-*.safetensors` of a folder; one is read when it is asked for, on the CPU.

    Files are mapped into memory, so that a rank which needs a shard of each tensor never holds them all.
    """

    def __init__(self, folder: Path, kind: str, prefix: str = "") -> None:
        self._prefix = prefix
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self._files |= {name: file for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._prefix + name].get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._files)

    def __len__(self) -> int:
        return len(self._files)
