"""Shards that are whole, and shards that are not."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ml.batching.shards import DatasetError, Shards, checksum, is_whole, write_shard

REMEDY = "encode again"


def entry(name: str, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=draws), f"{name}/head": torch.randn(4, 1, generator=draws)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two entries each."""
    for index in range(3):
        names = (f"a{index}", f"b{index}")
        write_shard(tmp_path / f"{index}.safetensors", {name: entry(name, index) for name in names}, "drawn")
    return tmp_path


def damage(path: Path, offset: int) -> None:
    """Flip one bit, so many bytes from the end."""
    raw = bytearray(path.read_bytes())
    raw[-offset] ^= 1
    path.write_bytes(raw)


def test_a_checksum_is_that_of_the_bytes_of_all_tensors() -> None:
    """CRC-32 of "123456789" is cbf43926, the check value of the algorithm (ISO 3309)."""
    digits = torch.from_numpy(np.frombuffer(b"123456789", np.uint8).copy())
    assert checksum([digits]) == checksum([digits[:4], digits[4:]]) == 0xCBF43926
    assert checksum([torch.zeros(2, 0)]) == 0


def test_an_entry_comes_back_and_the_same_entries_are_the_same_bytes(folder: Path) -> None:
    shards, wanted = Shards(folder, REMEDY), entry("a1", 1)
    found = shards.read("1.safetensors", "a1", ["a1", "a1/head", "a1/tail"])
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert shards.sums("1.safetensors")["a1"] == checksum(wanted.values())
    for again in range(5):
        write_shard(folder / "again.safetensors", {name: entry(name, 1) for name in ("a1", "b1")}, "drawn")
        assert (folder / "again.safetensors").read_bytes() == (folder / "1.safetensors").read_bytes(), again


def test_a_flipped_bit_is_found_and_named_with_the_remedy(folder: Path) -> None:
    damage(folder / "0.safetensors", 3)
    shards, names = Shards(folder, REMEDY), {name: [name, f"{name}/head"] for name in ("a0", "b0")}
    with pytest.raises(DatasetError, match=r"0\.safetensors, b0: the file is damaged: CRC-32 .*; encode again"):
        shards.read("0.safetensors", "b0", names["b0"])
    assert len(shards.read("0.safetensors", "a0", names["a0"])) == 2
    with pytest.raises(DatasetError, match=r"a0: the file is damaged: CRC-32 .* in place of 00000007"):
        shards.read("0.safetensors", "a0", names["a0"], crc32=7)


@pytest.mark.parametrize("left", [0, 5, 100, -8])
def test_a_file_cut_short_is_refused(folder: Path, left: int) -> None:
    path = folder / "0.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert not is_whole(path, "drawn")
    with pytest.raises(DatasetError, match=r"0\.safetensors, all of it: the file cannot be opened.*encode again"):
        Shards(folder, REMEDY).read("0.safetensors", "a0", ["a0"])


def test_a_file_that_is_missing_older_or_of_other_content_is_refused(folder: Path) -> None:
    assert is_whole(folder / "0.safetensors", "drawn")
    assert not is_whole(folder / "0.safetensors", "other")
    assert not is_whole(folder / "9.safetensors", "drawn")
    save_file({"a": torch.ones(1)}, folder / "old.safetensors", metadata={"content": "drawn"})
    assert not is_whole(folder / "old.safetensors", "drawn")
    for name, why in (("9", "cannot be opened"), ("old", "no checksums"), ("0", "does not hold it")):
        with pytest.raises(DatasetError, match=f"{why}.*encode again"):
            Shards(folder, REMEDY).read(f"{name}.safetensors", "z", ["z"])


def test_only_so_many_files_are_open_and_another_process_opens_its_own(folder: Path) -> None:
    shards = Shards(folder, REMEDY, most=2)
    for index in (0, 1, 2, 0):
        shards.read(f"{index}.safetensors", f"a{index}", [f"a{index}", f"a{index}/head"])
        assert len(shards._open) <= 2
    assert list(shards._open) == ["2.safetensors", "0.safetensors"]
    sent = pickle.loads(pickle.dumps(shards))
    assert (len(sent._open), sent.most) == (0, 2)
    assert torch.equal(sent.read("2.safetensors", "b2", ["b2", "b2/head"])["b2"], entry("b2", 2)["b2"])
