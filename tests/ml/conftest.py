"""A recipe small enough to train in seconds, a dataset of real clip files, latents in the format of `ml.encode`, and
`ranks`, which runs a function in several processes that form a torch.distributed world over gloo.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pandas as pd
import pytest

from infra.tracking import RunLog
from ml.entry import Call
from ml.manifest import EXAMPLES, LATENTS, stable_id
from ml.recipe import Recipe

ADAM = {"lr": 2e-3, "eps": 1e-8, "betas": (0.9, 0.99), "weight_decay": 0.0, "warmup_steps": 2}
MINI: dict[str, Any] = {
    "text": {"kind": "minilm", "max_tokens": 4, "context_dim": 8, "pooled_dim": 8},
    "autoencoder": {"net": {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 2, "latent_channels": 4}},
    "model": {"hidden_size": 32, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": (4, 6, 6)},
    "sampling": {"resolution": "48x80", "aspect": "80:48", "frames": 5, "steps": 3, "fps": 12},
    "evaluation": {"num_prompts": 2, "seeds": (0, 1), "loss_timesteps": 2, "loss_clips": 3},
}
ONE_CORE = {"accelerators": "CPU:1", "nodes": 1, "price": "cpu-assume-2026"}
STAGE = {
    "compute": ONE_CORE,
    "validation": None,
    "steps": 6,
    "checkpoint_every": 2,
    "optimizer": ADAM,
    "ema_decay": 0.9,
}

# Of every other generation: frames of its clips, autoencoder net, model, all as small as they can be.
SMALL_DIT = {"hidden_size": 48, "num_heads": 2, "depth": 1}
SMALL_SD = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}
SMALL: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "v1_0": (4, SMALL_SD, {**SMALL_DIT, "input_size": (4, 6, 10)}),
    "v1_1": (4, SMALL_SD, SMALL_DIT),
    "v1_2": (8, {**SMALL_SD, "filters": 8, "channel_multipliers": (1, 1, 1, 1)}, SMALL_DIT),
    "v1_3": (5, {"ch": 8}, SMALL_DIT),
}


def overlay(document: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on a nested mapping."""
    found = {k: document.get(k) for k in over}
    mixed = {k: overlay(found[k] or {}, v) if isinstance(v, dict) else v for k, v in over.items()}
    return {**document, **mixed}


MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def make_recipe(tiny_recipe: Recipe) -> MakeRecipe:
    """Factory `make_recipe(stage={...}, autoencoder_stage={...}, **sections)` of recipes that train in seconds."""

    def make(
        stage: dict[str, Any] | None = None, autoencoder_stage: dict[str, Any] | None = None, **over: Any
    ) -> Recipe:
        document = overlay(overlay(tiny_recipe.model_dump(mode="json"), MINI), over)
        buckets = {"48x80": {1: {"keep": 1.0, "batch": 3}, 5: {"keep": 1.0, "batch": 2}}}
        document["stages"] = [{**s, **STAGE, "buckets": buckets, **(stage or {})} for s in document["stages"]]
        document["compute"] = dict.fromkeys(document["compute"], ONE_CORE)
        small = {
            "compute": ONE_CORE,
            "steps": 4,
            "checkpoint_every": 2,
            "batch": 2,
            "resolution": "48x80",
            "optimizer": ADAM,
        }
        stages = document["autoencoder"]["stages"]
        document["autoencoder"]["stages"] = [{**s, **small, **(autoencoder_stage or {})} for s in stages]
        return Recipe.validate_document(document, "mini")

    return make


@pytest.fixture(scope="session")
def mini(make_recipe: MakeRecipe) -> Recipe:
    """The small recipe as it is."""
    return make_recipe()


@pytest.fixture(scope="session")
def make_generation() -> MakeRecipe:
    """Factory `make_generation("v1_1", stage={...}, autoencoder_stage={...}, **sections)`: 1.0 to 1.3, in seconds."""

    def make(
        name: str, stage: dict[str, Any] | None = None, autoencoder_stage: dict[str, Any] | None = None, **over: Any
    ) -> Recipe:
        frames, net, model = SMALL[name]
        small = {"text": {"max_tokens": 8}, "autoencoder": {"net": net}, "model": model}
        sampled = {"resolution": "48x80", "aspect": "80:48", "frames": frames, "steps": 3, "fps": 12}
        document = overlay(Recipe.load(name, "tiny").model_dump(mode="json"), {**small, "sampling": sampled})
        document = overlay(document, over)
        buckets = {"48x80": {1: {"keep": 1.0, "batch": 3}, frames: {"keep": 1.0, "batch": 2}}}
        document["stages"] = [{**s, **STAGE, "buckets": buckets, **(stage or {})} for s in document["stages"]]
        document["compute"] = dict.fromkeys(document["compute"], ONE_CORE)
        short = {"compute": ONE_CORE, "steps": 4, "checkpoint_every": 2, "batch": 2, "resolution": "48x80"}
        stages = document["autoencoder"]["stages"]
        document["autoencoder"]["stages"] = [
            {**s, **short, "frames": min(s["frames"], frames), "optimizer": ADAM, **(autoencoder_stage or {})}
            for s in stages
        ]
        return Recipe.validate_document(document, name)

    return make


@dataclass(frozen=True)
class Footage:
    """A workspace with a dataset folder in it."""

    workspace: Path
    dataset: Path


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> Footage:
    """Eight clips of 96x160 pixels, 12 frames per second, 8 to 11 frames; two are held out, half are of tier `high`."""
    root = tmp_path_factory.mktemp("footage")
    rows = []
    for index in range(8):
        path = make_video(root / "clips" / f"{index}.mp4", 8 + index % 4, (96, 160), fps=12, seed=index)
        rows.append(
            {
                "clip_id": stable_id("clip", index),
                "video_id": f"video{index}",
                "path": path.relative_to(root).as_posix(),
                "sha256": "0" * 64,
                "caption": f"waves of colour number {index} drift slowly",
                "split": "holdout" if index in (3, 6) else "train",
                "tiers": "base high finest" if index % 2 else "base",
                "width": 160,
                "height": 96,
                "fps": 12.0,
                "num_frames": 8 + index % 4,
                "licence": "CC0-1.0",
            }
        )
    (root / "dataset").mkdir()
    EXAMPLES.write(pd.DataFrame(rows), root / "dataset")
    return Footage(root, root / "dataset")


MakeLatents = Callable[[Recipe], Path]


@pytest.fixture(scope="session")
def make_latents(tmp_path_factory: pytest.TempPathFactory) -> MakeLatents:
    """Factory `make_latents(recipe)`: ten clips (three held out) at 48x80, drawn from a seed, with their text.

    They are there as images and at the recipe's sampling length, with the clips' ends where its network is told of
    them. Prompts have one to all of the text's tokens.
    """
    import torch

    from ml.batching.shards import checksum, write_shard

    def make(recipe: Recipe) -> Path:
        folder = tmp_path_factory.mktemp("latents")
        generator = torch.Generator().manual_seed(0)
        channels, text, video = recipe.autoencoder.latent_channels, recipe.text, recipe.sampling.frames
        ends = ("head", "tail") if recipe.model.conditioning in ("channels", "embed") else ()
        rows, entries, texts = [], {}, {}
        for index in range(10):
            clip_id = f"clip{index}"
            for frames in (1, video):
                key = f"{clip_id}/48x80/48x80/{frames}"
                length = recipe.strides.latent_frames(frames)
                entries[key] = {key: torch.randn(channels, length, 6, 10, generator=generator)}
                for end in ends if frames > 1 else ():
                    entries[key][f"{key}/{end}"] = torch.randn(channels, 1, 6, 10, generator=generator)
                crc32 = checksum(entries[key].values())
                rows.append(
                    {"key": key, "clip_id": clip_id, "frames": frames, "fps": 12.0 - index / 10, "crc32": crc32}
                )
        for index, name in enumerate(("null", *(f"clip{index}" for index in range(10)))):
            texts[name] = {
                f"{name}/context": torch.randn(text.max_tokens, text.context_dim, generator=generator),
                f"{name}/pooled": torch.randn(text.pooled_dim, generator=generator),
                f"{name}/mask": torch.arange(text.max_tokens) <= index % text.max_tokens,
            }
        write_shard(folder / "latents-00000.safetensors", entries, "drawn")
        write_shard(folder / "text.safetensors", texts, "drawn")
        frame = pd.DataFrame(rows).assign(
            split=lambda rows: ["holdout" if i in ("clip2", "clip5", "clip9") else "train" for i in rows["clip_id"]],
            tiers="base",
            resolution="48x80",
            height=48,
            width=80,
            shard="latents-00000.safetensors",
            stages=" ".join(stage.name for stage in recipe.stages),
        )
        LATENTS.write(frame, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def latents(make_latents: MakeLatents, mini: Recipe) -> Path:
    """Latents of the small recipe, as images and as 5 frames."""
    return make_latents(mini)


@pytest.fixture
def make_call(tmp_path: Path) -> Callable[..., Call]:
    """Factory `make_call(op, recipe, out="out", inputs={...}, **options)` of calls that log nowhere."""

    def make(op: str, recipe: Recipe, out: str = "out", inputs: dict[str, Any] | None = None, **options: str) -> Call:
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        given = {name: (found,) if isinstance(found, Path) else tuple(found) for name, found in (inputs or {}).items()}
        return Call(op, recipe, tmp_path, folder, given, options, RunLog())

    return make


Ranks = Callable[..., list[Any]]

# What ranks import, and torch's compiler, which every optimiser pulls in: some eight seconds, once a pytest worker.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "pytest", "ml.train"),
    *("ml.engines.fsdp", "ml.engines.colossal", "ml.engines.pipeline", "ml.engines.sequence", "ml.engines.tensor"),
    *("ml.models.mmdit", "ml.models.stdit", "ml.models.stdit2", "ml.models.stdit3", "ml.models.text"),
    *("ml.models.autoencoders.registry", "colossalai.booster.plugin", "colossalai.zero.low_level", "torchao"),
)


class ByValue:
    """A callable that another process can load though it cannot import the test module that holds it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        module = sys.modules[self.function.__module__]
        cloudpickle.register_pickle_by_value(module)
        try:
            return cloudpickle.loads, (cloudpickle.dumps(self.function),)
        finally:
            cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Call `ranks(function, *args, count=2, timeout=120)`: what every rank's `function(*args)` returned, in order.

    Ranks see the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ...) and start in a fraction
    of a second, forked from a server that has imported what they need. A rank that fails takes the others with it, and
    the test gets its traceback. `expect_death=True` returns the exit codes instead.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    return _ranks


def _ranks(
    function: Callable[..., Any], *args: Any, count: int = 2, timeout: float = 120.0, expect_death: bool = False
) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    started = [
        context.Process(target=ByValue(_rank), args=(ByValue(function), args, rank, count, port, pipes[rank][1]))
        for rank in range(count)
    ]
    for process, (_, ours) in zip(started, pipes, strict=True):
        process.start()
        ours.close()
    try:
        said = _answers(started, [theirs for theirs, _ in pipes], time.monotonic() + timeout, expect_death)
    finally:
        for process in started:
            process.kill()
            process.join()
    if expect_death:
        return [process.exitcode for process in started]
    return said


def _rank(function: Any, args: Any, rank: int, count: int, port: int, pipe: Any) -> None:
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(cloudpickle.dumps(answer))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)


def _answers(started: list[Any], pipes: list[Any], deadline: float, expect_death: bool) -> list[Any]:
    """What the ranks sent; raises with the traceback of the first that failed, died or took too long."""
    answers: dict[int, Any] = {}
    while len(answers) < len(started):
        for rank, pipe in enumerate(pipes):
            if rank in answers or not pipe.poll(0.02):
                continue
            try:
                good, answer = cloudpickle.loads(pipe.recv_bytes())
            except EOFError:
                started[rank].join()
                good, answer = expect_death, f"died with exit code {started[rank].exitcode}"
            assert good, f"rank {rank} of {len(started)}: {answer}"
            answers[rank] = answer
        assert time.monotonic() < deadline, f"ranks {sorted({*range(len(started))} - {*answers})} took too long"
    return [answers[rank] for rank in range(len(started))]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
