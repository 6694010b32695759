"""Fixtures that every test may ask for. Nothing here is imported by name: pytest finds it."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluation.report import Protocol
from infra.settings import TELEMETRY_OFF
from infra.tracking import Tracker
from infra.workspace import Workspace
from ml.recipe import Recipe

MakeVideo = Callable[..., Path]


def pytest_configure() -> None:
    """Set up the process before anything is collected: nothing reports home, nothing opens a window or a real store."""
    os.environ.update(TELEMETRY_OFF, MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
    for name in [n for n in os.environ if n.startswith(("OPENSORA_", "DAGSTER_HOME", "MLFLOW_TRACKING", "MLFLOW_RUN"))]:
        del os.environ[name]
    # Two cores are shared with other workers and with the tasks that tests start as processes; read when torch loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace of this test's own."""
    root = tmp_path / "workspace"
    root.mkdir(exist_ok=True)
    return Workspace(root)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite file of an MLflow store without runs: it costs several seconds to make, and a millisecond to copy."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracker(f"sqlite:///{file}").check()
    return file


@pytest.fixture
def tracker(empty_store: Path, workspace: Workspace) -> Tracker:
    """A tracker with a store of its own, in the workspace of the test."""
    shutil.copy(empty_store, workspace.tracking_db)
    return Tracker(f"sqlite:///{workspace.tracking_db}")


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The recipe that walks the whole house on two CPU cores."""
    return Recipe.load("v2_0", "tiny")


@pytest.fixture
def protocol() -> Protocol:
    """A protocol of the tiny recipe."""
    return Protocol(
        recipe="v2_0-tiny",
        prompt_set="walk",
        prompt_digest="0" * 16,
        seeds=(0, 1),
        resolution="96px",
        aspect="16:9",
        frames=17,
        fps=12.0,
        sampling_steps=20,
        guidance_text=3.0,
        guidance_image=3.0,
        oscillate=True,
        sampling_digest="5" * 16,
        objective_digest="6" * 16,
        loss_timesteps=5,
        loss_clips=16,
        held_out_digest="1" * 16,
        autoencoder_digest="2" * 16,
        text_encoder_digest="3" * 16,
        lpips_digest="4" * 16,
        vbench_version="0.1.5",
        torch_version="2.13.0",
        device="CPU",
    )


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """Factory `make_video(path, frames=24, size=(48, 80), fps=12, cuts=(), seed=0)` of small synthetic H.264 films.

    Each shot is a drifting colour pattern of its own, so that cuts are cuts, motion is motion and no frame is blank.
    `size` is (height, width) in pixels; `cuts` are the indices of the first frames of shots. Returns the path.
    """
    return _make_video


def _make_video(
    path: Path,
    frames: int = 24,
    size: tuple[int, int] = (48, 80),
    *,
    fps: int = 12,
    cuts: Sequence[int] = (),
    seed: int = 0,
) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    starts = [0, *cuts]
    looks = [rng.uniform(size=(3, 5)) for _ in starts]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            shot = sum(index >= cut for cut in cuts)
            picture = _pattern(size, looks[shot], index - starts[shot], brightness=0.25 + 0.5 * (shot % 2))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _pattern(size: tuple[int, int], look: np.ndarray, frame: int, brightness: float) -> np.ndarray:
    """One picture [H, W, 3] of waves; neighbouring shots differ in brightness by half the range, so cuts show."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    channels = []
    for a, b, phase, drift, contrast in look:
        turns = x * (1 + 3 * a) + y * (1 + 3 * b) + phase + frame * (0.01 + 0.03 * drift)
        channels.append(brightness + 0.2 * (0.5 + contrast) * np.sin(2 * np.pi * turns))
    return (np.clip(np.stack(channels, axis=-1), 0, 1) * 255).astype(np.uint8)
