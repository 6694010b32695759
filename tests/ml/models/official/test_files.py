"""Reading official weights: every container, and every way in which a file can be bad."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ml.models.official.files import Header, OfficialError, headers, open_official, tensors, write

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "n": torch.tensor(3),
    "none": torch.zeros(0, 4),
}
HEADERS = {
    "a.weight": (torch.float32, (2, 3)),
    "b": (torch.bfloat16, (2,)),
    "n": (torch.int64, ()),
    "none": (torch.float32, (0, 4)),
}


def same(found: dict[str, Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


def index(folder: Path, places: dict[str, str], name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return path


def sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({name: STATE[name] for name in ("a.weight", "b")}, folder / "one.safetensors")
    save_file({name: STATE[name] for name in ("n", "none")}, folder / "two.safetensors")
    first = dict.fromkeys(("a.weight", "b"), "one.safetensors")
    return index(folder, first | dict.fromkeys(("n", "none"), "two.safetensors"))


# --- what can be read ---------------------------------------------------------------------------------------------


def test_a_safetensors_file_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    assert headers(path) == HEADERS
    assert same(dict(tensors(path)))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_of_torch_is_read(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    assert headers(path) == HEADERS
    assert same(dict(tensors(path)))


def test_shards_are_one_set_of_weights(tmp_path: Path) -> None:
    path = sharded(tmp_path / "hf")
    assert headers(path) == HEADERS
    assert same(dict(tensors(path.parent)))
    assert len(open_official(path).files) == 2
    assert len(open_official(path).sha256()) == 64


def test_a_folder_of_diffusers_is_read_past_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / "other.safetensors")
    assert same(dict(tensors(tmp_path)))


def test_a_checkpoint_of_the_booster_is_found_in_its_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "epoch0-global_step100" / "model"
    folder.mkdir(parents=True)
    torch.save(STATE, folder / "pytorch_model-00001.bin")
    index(folder, dict.fromkeys(STATE, "pytorch_model-00001.bin"), "pytorch_model.bin.index.json")
    assert same(dict(tensors(folder.parent)))


@pytest.mark.parametrize(
    ("wrap", "unwrapped"),
    [
        (lambda s: {"ema": s, "model": {"x": torch.zeros(1)}, "opt": {}}, ("key `ema`",)),
        (lambda s: {"state_dict": s, "epoch": 3}, ("key `state_dict`",)),
        (lambda s: {"model": {"state_dict": s}}, ("key `model`", "key `state_dict`")),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, ("prefix `module.`",)),
        (lambda s: {"model": {f"module._orig_mod.{n}": t for n, t in s.items()}}, None),
        (lambda s: {**s, "step": 7}, ("`step`, which is no tensor",)),
    ],
)
def test_wrappers_are_taken_off_and_told(tmp_path: Path, wrap: Any, unwrapped: tuple[str, ...] | None) -> None:
    torch.save(wrap(STATE), tmp_path / "w.pt")
    official = open_official(tmp_path / "w.pt")
    assert same({name: official.read(name) for name in official.headers})
    assert official.unwrapped == (unwrapped or ("key `model`", "prefix `module.`", "prefix `_orig_mod.`"))


def test_parameters_come_without_their_gradients(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.pt")
    assert not open_official(tmp_path / "w.pt").read("w").requires_grad


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OfficialError, match=r"nowhere\.safetensors does not exist"):
        headers(tmp_path / "nowhere.safetensors")


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(OfficialError, match=r"unknown suffix '.gguf'; known: .safetensors"):
        headers(tmp_path / "w.gguf")


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello", encoding="utf-8")
    with pytest.raises(OfficialError, match=r"holds no weights; it holds readme.md"):
        headers(tmp_path)


def test_a_folder_of_several_weights_asks_for_one(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    with pytest.raises(OfficialError, match=r"x.safetensors, y.safetensors: name the one"):
        headers(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path / "hf")
    (path.parent / "two.safetensors").unlink()
    with pytest.raises(OfficialError, match=r"lacks 1 of 2 shards: two.safetensors"):
        headers(path)


def test_a_shard_that_lacks_its_tensor_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path / "hf")
    save_file({"n": STATE["n"]}, path.parent / "two.safetensors")
    with pytest.raises(OfficialError, match=r"places none in two.safetensors"):
        headers(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../elsewhere.safetensors"}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(OfficialError, match=r"m.index.json (is not JSON|has no weight_map)"):
        headers(tmp_path / "m.index.json")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda b: b[:-5], "truncated"),
        (lambda b: b + b"x", "corrupt"),
        (lambda b: b[:20], "corrupt or truncated"),
        (lambda b: b"", "corrupt or truncated"),
        (lambda b: b[:8] + b"?" + b[9:], "not JSON"),
        (lambda b: b.replace(b"[2,3]", b"[2,4]"), "bytes of a.weight do not fit"),
        (lambda b: b.replace(b'"F32"', b'"F99"'), "of dtype F99"),
        (lambda b: b.replace(b"data_offsets", b"data_offsetz"), "has no place"),
        (lambda b: b.replace(b'"shape"', b'"shapo"'), "no dtype or shape"),
        (lambda b: (2).to_bytes(8, "little") + b"[]", "no mapping"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_damaged_safetensors_are_refused_before_anything_is_read(tmp_path: Path, damage: Any, what: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(STATE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OfficialError, match=what):
        headers(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OfficialError, match="corrupt or truncated"):
        headers(path)


class Malice:
    """A pickle that would make a folder, were it opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_carries_code_is_not_run_and_its_wish_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "x": Malice(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(OfficialError, match=r"carries code: it wants to call \w+\.mkdir.*safetensors"):
        headers(tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()


def test_a_harmless_object_in_a_pickle_is_refused_too(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "args": argparse.Namespace(lr=1.0)}, tmp_path / "w.pth")
    with pytest.raises(OfficialError, match=r"wants to call argparse\.Namespace"):
        headers(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"lr": 0.1}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(OfficialError, match="holds no tensors by name"):
        headers(tmp_path / "w.pt")


def test_numbers_that_no_weights_have_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "w.pt")
    with pytest.raises(OfficialError, match=r"w is of dtype torch\.complex64"):
        headers(tmp_path / "w.pt")


# --- writing ------------------------------------------------------------------------------------------------------


def test_the_library_reads_what_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    path = tmp_path / "out" / "w.safetensors"
    wanted = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in STATE.items()}
    write(path, wanted, reversed(STATE.items()))
    assert same(load_file(path))
    assert same(dict(tensors(path)))


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    view = torch.arange(6.0).reshape(2, 3).T
    write(tmp_path / "w.safetensors", {"v": Header(view.dtype, (3, 2))}, [("v", view)])
    assert torch.equal(load_file(tmp_path / "w.safetensors")["v"], view)


@pytest.mark.parametrize(
    "content",
    [[], [("x", torch.zeros(1))], [("w", torch.zeros(3))], [("w", torch.zeros(2))] * 2],
    ids=["missing", "unknown", "other shape", "twice"],
)
def test_what_was_not_announced_is_not_written(tmp_path: Path, content: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(OfficialError, match=r"never came|not announced"):
        write(tmp_path / "w.safetensors", {"w": Header(torch.float32, (2,))}, content)
    assert list(tmp_path.iterdir()) == []
