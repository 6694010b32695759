"""The VBench environment: made from one lock, made once, and a failure says what was tried."""

import re
from pathlib import Path

import pytest

from evaluation.vbench_environment import LOCK, EnvironmentFailedError, ensure_environment, is_ready


def test_the_lock_pins_names_and_versions_only_with_what_vbench_needs():
    lines = LOCK.read_text(encoding="utf-8").split()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    assert {"torch==2.13.0", "torchvision==0.28.0", "vbench==0.1.5", "transformers==4.33.2"} <= set(lines)
    versions = dict(line.split("==") for line in lines)
    assert versions["numpy"].startswith("1.")
    assert int(versions["setuptools"].split(".")[0]) < 81  # openai-clip imports pkg_resources, gone from 81 on


def test_an_empty_lock_makes_an_environment_once_and_another_lock_makes_it_again(tmp_path: Path):
    lock, folder = tmp_path / "lock.txt", tmp_path / "venv"
    lock.write_text("# nothing\n", encoding="utf-8")
    python = ensure_environment(folder, lock)
    assert python.exists()
    made = python.lstat().st_mtime_ns
    assert ensure_environment(folder, lock) == python
    assert python.lstat().st_mtime_ns == made
    lock.write_text("# still nothing\n", encoding="utf-8")
    assert not is_ready(folder, lock)


def test_a_lock_that_cannot_be_installed_leaves_no_marker(tmp_path: Path):
    lock, folder = tmp_path / "lock.txt", tmp_path / "venv"
    lock.write_text("not a requirement at all !!\n", encoding="utf-8")
    with pytest.raises(EnvironmentFailedError, match="pip install"):
        ensure_environment(folder, lock)
    assert not is_ready(folder, lock)
