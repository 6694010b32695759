"""Reconstruction numbers become metrics, and what was not measured says so."""

import json

import pytest

from evaluation.reconstruction import ReconstructionError, fetch_lpips, reconstruction_metrics
from infra.tracking import RunLog
from ml.entry import Call


def test_numbers_are_prefixed_and_a_missing_one_keeps_its_reason(tmp_path):
    found = {
        "psnr": 21.5,
        "ssim": 0.7,
        "lpips": None,
        "lpips_reason": "no weights",
        "psnr_mean_frame": 15,
        "num_clips": 3,
    }
    (tmp_path / "reconstruction.json").write_text(json.dumps(found), encoding="utf-8")
    metrics, absent = reconstruction_metrics(tmp_path)
    assert metrics == {"reconstruction/psnr": 21.5, "reconstruction/ssim": 0.7, "reconstruction/psnr_mean_frame": 15.0}
    assert absent["reconstruction/lpips"] == "no weights"
    assert "did not measure" in absent["reconstruction/psnr_own_mean_frame"]


def test_no_file_and_no_numbers_are_errors(tmp_path):
    with pytest.raises(ReconstructionError, match="has not finished"):
        reconstruction_metrics(tmp_path)
    (tmp_path / "reconstruction.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ReconstructionError, match="holds none"):
        reconstruction_metrics(tmp_path)


def test_cached_weights_are_placed_in_the_step_without_a_network(tmp_path):
    cached = tmp_path / "cache" / "lpips" / "alex.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    out = tmp_path / "out"
    out.mkdir()
    fetch_lpips(Call("lpips_alex", None, tmp_path, out, {}, {}, RunLog(None, None)))
    assert (out / "alex.safetensors").read_bytes() == b"weights"
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["data"] == ["alex.safetensors"]
    assert len(result["facts"]["digest"]) == 16
