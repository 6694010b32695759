from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.storage import sha256_of
from ml.training.tensor_files import TensorFiles, write


def test_tensors_are_found_in_whichever_file_they_lie(tmp_path: Path) -> None:
    parts = [
        {"mean/a": torch.randn(3, 4), "square/a": torch.rand(3, 4)},
        {},  # a rank that got no name
        {"mean/b": torch.tensor(2.5), "square/b": torch.tensor(0.5), "mean/c.d": torch.randn(2, 3).T},
    ]
    for rank, part in enumerate(parts):
        path = tmp_path / f"moments-{rank:05d}-of-00003.safetensors"
        assert write(path, part) == sha256_of(path)
    write(tmp_path / "masters-00000-of-00001.safetensors", {"mean/a": torch.zeros(1)})
    mean, square = (TensorFiles(tmp_path, "moments", prefix) for prefix in ("mean/", "square/"))
    assert sorted(mean) == ["a", "b", "c.d"]
    assert len(square) == 2
    for name in mean:
        assert torch.equal(mean[name], {k: v for part in parts for k, v in part.items()}[f"mean/{name}"])
    assert mean["b"].shape == ()
    assert "x" not in mean
    with pytest.raises(KeyError):
        mean["x"]


def test_what_is_written_is_plain_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "masters-00000-of-00001.safetensors", {"weight": torch.arange(6.0).view(2, 3)})
    assert torch.equal(
        load_file(tmp_path / "masters-00000-of-00001.safetensors")["weight"][1], torch.tensor([3.0, 4, 5])
    )


def test_a_folder_without_such_files_holds_nothing(tmp_path: Path) -> None:
    assert dict(TensorFiles(tmp_path, "average")) == {}
