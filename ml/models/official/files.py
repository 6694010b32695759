"""Files of official weights: read without trust, and without loading more than is asked for.

Safetensors headers are parsed here, byte by byte, because the library maps whole files into private memory: 47 GB of
published weights would be refused by a 16 GB machine before a single name is known. Pickles are opened with
`weights_only` and memory-mapped, so nothing in them runs and nothing is read until it is used.
"""

import hashlib
import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infra.storage import atomic_stream, sha256_of

# Names of dtypes in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The library's own limit (safetensors 0.8): a longer header is an attack or not a header.
HEADER_BYTES = 100_000_000
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
# Where training code puts a state dict inside a checkpoint; the first that is there wins.
WRAPPERS = ("ema", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
LFS = b"version https://git-lfs"


class OfficialError(ValueError):
    """Weights that cannot be read or do not fit: what is wrong, where, and what to do."""


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Official:
    """Opened weights: the files they lie in, every name with dtype and shape, and what was unwrapped to get there."""

    path: Path
    files: tuple[Path, ...]
    headers: Mapping[str, Header]
    unwrapped: tuple[str, ...]
    read: Callable[[str], Tensor]

    def sha256(self) -> str:
        """Digest of the file; of several shards, the digest of their digests and names."""
        if len(self.files) == 1:
            return sha256_of(self.files[0])
        lines = "".join(f"{sha256_of(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def headers(path: Path) -> dict[str, Header]:
    """Name -> (dtype, shape) of every tensor, none of them loaded; raises OfficialError."""
    return dict(open_official(path).headers)


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, read one at a time; raises OfficialError."""
    official = open_official(path)
    return ((name, official.read(name)) for name in official.headers)


def open_official(path: Path) -> Official:
    """Open a safetensors file, a `.index.json` of shards, a `.pth`/`.pt`/`.bin` checkpoint, or a folder with one.

    Folders may be diffusers' (`config.json` and weights) or ColossalAI's (`model/` with an index). Raises
    OfficialError for files that are missing, damaged, of an unknown kind, or that carry code.
    """
    if not path.exists():
        raise OfficialError(f"{path} does not exist: give a weights file, an index.json, or a folder that holds one")
    if path.is_dir():
        return open_official(_inside(path))
    if path.name.endswith(".index.json"):
        return _unwrap(_shards(path))
    if path.suffix == ".safetensors":
        return _unwrap(_safetensors(path))
    if path.suffix in PICKLES:
        return _unwrap(_pickle(path))
    raise OfficialError(f"{path.name}: unknown suffix {path.suffix!r}; known: .safetensors, .index.json, {_known()}")


def write(path: Path, wanted: Mapping[str, Header], content: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file tensor by tensor, each to its place, so that memory holds one at a time.

    The file appears when it is complete. Raises OfficialError when `content` is not exactly what `wanted` says.
    """
    # Wide dtypes first, as the library does: then every tensor is aligned to its own size.
    order = sorted(wanted, key=lambda name: (-wanted[name].dtype.itemsize, name))
    starts: dict[str, int] = {}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        starts[name], end = end, end + _num_bytes(wanted[name])
        dtype, shape = wanted[name]
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    missing = set(wanted)
    with atomic_stream(path) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.truncate(8 + len(head) + end)
        for name, tensor in content:
            if name not in missing or Header(tensor.dtype, tuple(tensor.shape)) != wanted[name]:
                raise OfficialError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not announced, or came twice")
            missing.remove(name)
            stream.seek(8 + len(head) + starts[name])
            stream.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if missing:
            raise OfficialError(f"{path.name}: {len(missing)} tensors never came, {min(missing)} among them")


def _inside(folder: Path) -> Path:
    """The one thing in a folder that holds weights."""
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", *(f"*{end}" for end in PICKLES)):
        found = sorted(folder.glob(pattern))
        usual = [p for p in found if p.stem.partition(".")[0] in ("diffusion_pytorch_model", "model", "pytorch_model")]
        if len(found) == 1:
            return found[0]
        if len(usual) == 1:
            return usual[0]
        if found:
            raise OfficialError(f"{folder} holds {', '.join(p.name for p in found)}: name the one to import")
    if (folder / "model").is_dir():  # a checkpoint of ColossalAI's booster
        return folder / "model"
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise OfficialError(f"{folder} holds no weights; it holds {names}. Known: .safetensors, .index.json, {_known()}")


def _known() -> str:
    return ", ".join(PICKLES)


# --- safetensors --------------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> Official:
    begin, table = _table(path)
    spans: dict[str, int] = {}
    found: dict[str, Header] = {}
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: _offsets(path, *item)):
        start, stop = _offsets(path, name, entry)
        found[name] = _header(path, name, entry)
        if start != end or stop - start != _num_bytes(found[name]):
            raise OfficialError(f"{path}: corrupt, the bytes of {name} do not fit its dtype and shape; download again")
        spans[name], end = begin + start, stop
    size = path.stat().st_size
    if size != begin + end:
        what = "truncated" if size < begin + end else "corrupt"
        raise OfficialError(f"{path}: {what}, its header tells of {begin + end:,} bytes, it has {size:,}; get it again")

    def read(name: str) -> Tensor:
        buffer = bytearray(_num_bytes(found[name]))
        with path.open("rb") as stream:
            stream.seek(spans[name])
            stream.readinto(buffer)
        dtype, shape = found[name]
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)

    ordered = {name: found[name] for name in table}
    return Official(path, (path,), ordered, (), read)


def _table(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header's entries."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(len(LFS))
        if start == LFS:
            raise OfficialError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`, or download it")
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size - 8, HEADER_BYTES):
            raise OfficialError(f"{path}: no safetensors header in its {size:,} bytes: corrupt or truncated")
        stream.seek(8)
        try:
            table = json.loads(stream.read(length))
        except ValueError as error:
            raise OfficialError(f"{path}: corrupt, its header is not JSON ({error}); download it again") from error
    if not isinstance(table, dict):
        raise OfficialError(f"{path}: corrupt, its header is no mapping; download it again")
    table.pop("__metadata__", None)
    return 8 + length, table


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(start), int(stop)]} if 0 <= start <= stop:
            return start, stop
    raise OfficialError(f"{path}: corrupt, {name} has no place in the file; download it again")


def _header(path: Path, name: str, entry: Any) -> Header:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)} if all(isinstance(n, int) and n >= 0 for n in shape):
            if dtype not in DTYPES:
                raise OfficialError(f"{path}: {name} is of dtype {dtype}; known: {', '.join(DTYPES)}")
            return Header(DTYPES[dtype], tuple(shape))
    raise OfficialError(f"{path}: corrupt, {name} has no dtype or shape; download it again")


def _num_bytes(header: Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize


# --- shards -------------------------------------------------------------------------------------------------------


def _shards(index: Path) -> Official:
    """Weights in several files, as an index lists them (Hugging Face and ColossalAI write the same one)."""
    places = _places(index)
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise OfficialError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}; download them again"
        )
    opened = {shard: _one(index.parent / shard) for shard in shards}
    for name, shard in places.items():
        if name not in opened[shard].headers:
            raise OfficialError(f"{index.name} places {name} in {shard}, which does not hold it; download both again")
    files = tuple(index.parent / shard for shard in shards)
    found = {name: opened[shard].headers[name] for name, shard in places.items()}
    return Official(index, files, found, (), lambda name: opened[places[name]].read(name))


def _places(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OfficialError(f"{index} is not JSON ({error}); download it again") from error
    match content:
        case {"weight_map": dict(places)} if all(isinstance(p, str) and p == Path(p).name for p in places.values()):
            return {str(name): str(shard) for name, shard in places.items()}
    raise OfficialError(f"{index} has no weight_map of names to files beside it; download it again")


def _one(path: Path) -> Official:
    return _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)


# --- pickles ------------------------------------------------------------------------------------------------------


def _pickle(path: Path) -> Official:
    """A checkpoint of `torch.save`, unwrapped to its state dict; mapped into memory, so only used bytes are read."""
    state, wrappers = _load(path), []
    while isinstance(state, Mapping) and (inner := next((w for w in WRAPPERS if _filled(state, w)), None)):
        state = state[inner]
        wrappers.append(f"key `{inner}`")
    kept = {str(k): v.detach() for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not kept:
        raise OfficialError(f"{path} holds no tensors by name (looked below {', '.join(WRAPPERS)} too)")
    strange = next((name for name, tensor in kept.items() if tensor.dtype not in NAMES), None)
    if strange is not None:
        raise OfficialError(f"{path}: {strange} is of dtype {kept[strange].dtype}; known: {', '.join(DTYPES)}")
    wrappers += [f"`{name}`, which is no tensor" for name in state if str(name) not in kept]
    found = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    return Official(path, (path,), found, tuple(wrappers), kept.__getitem__)


def _filled(state: Mapping[Any, Any], name: str) -> bool:
    return isinstance(state.get(name), Mapping) and bool(state[name])


def _load(path: Path) -> Any:
    with path.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            raise OfficialError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`, or download it")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6: no zip, no mapping
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OfficialError(f"{path}: corrupt or truncated, torch says: {line[:160]}; download it again") from error


def _refused(path: Path, said: str) -> OfficialError:
    """What `weights_only` would not do: run code that the pickle names, or read what is no pickle."""
    named = re.search(r"(?:GLOBAL|class|global|function)\s+[`'\"]?([A-Za-z_][\w.]*\.\w+)", said)
    if named is None:
        return OfficialError(f"{path}: corrupt, this is no pickle of torch ({said.strip().splitlines()[-1][:120]})")
    return OfficialError(
        f"{path} carries code: it wants to call {named[1]}, and was not opened. If you trust its maker, load it in a "
        "place that you can throw away (a container without network), save only its tensors with "
        "safetensors.torch.save_file, and import that file"
    )


# --- names --------------------------------------------------------------------------------------------------------


def _unwrap(official: Official) -> Official:
    """Without prefixes that wrappers put before every name (`module.` of DDP, `_orig_mod.` of torch.compile)."""
    names, unwrapped = {name: name for name in official.headers}, list(official.unwrapped)
    while names and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in names)), None)):
        names = {name.removeprefix(prefix): stored for name, stored in names.items()}
        unwrapped.append(f"prefix `{prefix}`")
    found = {name: official.headers[stored] for name, stored in names.items()}
    return Official(official.path, official.files, found, tuple(unwrapped), lambda name: official.read(names[name]))
