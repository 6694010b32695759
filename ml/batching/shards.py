"""Shards: safetensors files of many small tensors, each with a checksum that is compared when it is read.

A file's metadata says in one document what it was made of (`content`) and the CRC-32 of every entry (`crc32`): an entry
is one clip, or one text, and may be several tensors. Disks and copies do flip bits; a network trains on the result
without a word.
"""

import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Files that one process keeps open: a process may open 1024 on a usual Linux, and workers are processes of their own.
OPEN_SHARDS = 64
# The only name in the metadata: safetensors writes several in any order, and the same shard must be the same bytes.
ABOUT = "shard"


class DatasetError(ValueError):
    """A dataset that cannot serve a stage, with what to do about it."""


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 (zlib) over the bytes of tensors on the CPU, one after the other."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().flatten().numpy().data, value)
    return value


def write_shard(path: Path, entries: Mapping[str, Mapping[str, Tensor]], content: str) -> None:
    """Write entries, each tensors by their full name, and rename the file into place; `content` says of what."""
    sums = {name: checksum(tensors.values()) for name, tensors in entries.items()}
    flat = {name: tensor for tensors in entries.values() for name, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(flat, partial, metadata={ABOUT: json.dumps({"content": content, "crc32": sums})})
    partial.replace(path)


def is_whole(path: Path, content: str) -> bool:
    """Whether a file was written to its end, from the same content."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as tensors:
            return bool(_about(tensors)["content"] == content)
    except (SafetensorError, ValueError):
        return False


class Shards:
    """The shards of one folder, opened when they are first read and at most `most` at a time, by each process alone.

    May be sent to another process, which opens its own. `remedy` says what makes a damaged file again.
    """

    def __init__(self, folder: Path, remedy: str, most: int = OPEN_SHARDS) -> None:
        self.folder, self.remedy, self.most = folder, remedy, most
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        # A thread that reads ahead and one that looks at training may read at once.
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path, str, int]]:
        return Shards, (self.folder, self.remedy, self.most)

    def read(self, file: str, entry: str, names: Sequence[str], crc32: int | None = None) -> dict[str, Tensor]:
        """Those tensors of an entry that are there, by name; all that the entry has must be among `names`.

        `crc32` is what the entry must have, None what the file itself says. Raises DatasetError naming file, entry and
        remedy when the file is missing, cut short or damaged.
        """
        shard = self._shard(file)
        wanted = shard.sums.get(entry) if crc32 is None else crc32
        try:
            found = {name: shard.tensors.get_tensor(name) for name in names if name in shard.names}
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, entry, f"cannot be read: {error}") from error
        if not found or wanted is None:
            raise self._damaged(file, entry, "does not hold it")
        seen = checksum(found.values())
        if seen != wanted:
            raise self._damaged(file, entry, f"is damaged: CRC-32 {seen:08x} in place of {wanted:08x}")
        return found

    def sums(self, file: str) -> Mapping[str, int]:
        """CRC-32 of every entry of a file, as it was when the file was written."""
        return self._shard(file).sums

    def _shard(self, file: str) -> "_Shard":
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = _Shard(self.folder / file)
                except (SafetensorError, OSError, ValueError) as error:
                    raise self._damaged(file, "all of it", f"cannot be opened: {error}") from error
                if len(self._open) > self.most:
                    self._open.popitem(last=False)
            self._open.move_to_end(file)
            return self._open[file]

    def _damaged(self, file: str, entry: str, what: str) -> DatasetError:
        return DatasetError(f"shard {self.folder / file}, {entry}: the file {what}; {self.remedy}")


class _Shard:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self.tensors: Any = safe_open(path, "pt")
        self.names: frozenset[str] = frozenset(self.tensors.keys())  # type: ignore[no-untyped-call]
        self.sums: dict[str, int] = _about(self.tensors)["crc32"]


def _about(tensors: Any) -> dict[str, Any]:
    """What a file says of itself; ValueError when it says nothing."""
    metadata = tensors.metadata() or {}
    if ABOUT not in metadata:
        raise ValueError("it has no checksums")
    found: dict[str, Any] = json.loads(metadata[ABOUT])
    return found
