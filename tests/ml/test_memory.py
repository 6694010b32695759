"""Memory of a rank against closed forms, published figures, and the states that real engines hold."""

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed as dist
from torch import nn

from ml import memory as m
from ml.architectures import HunyuanNet
from ml.counts import adapter_lanes, parameters
from ml.engines.plain import PlainEngine
from ml.engines.tensor import shard_
from ml.methods import Loading, Lora, Validation
from ml.models.networks import build_network, num_parameters
from ml.models.text import packaged_minilm
from ml.recipe import Recipe, available
from ml.sections import AutoencoderStage, Compute, Stage
from ml.training.lora import add_lora
from ml.training.optim import adamw, schedule

LARGE = ("256px", 129)


@pytest.fixture(scope="module")
def paper() -> Recipe:
    return Recipe.load("v2_0", "paper")


def changed(stage: Stage, **engine: Any) -> Stage:
    return stage.model_copy(update={"engine": stage.engine.model_copy(update=engine)})


def states(recipe: Recipe, stage: Stage, devices: int | None = None) -> m.States:
    return m.memory(recipe, stage, LARGE, devices=devices).states


def test_zero_takes_the_published_bytes(paper: Recipe) -> None:
    """4N + 12N/d under stage 1 and 2N + 14N/d under stage 2 (arXiv 1910.02054), 16N/d sharded whole; 224 ranks."""
    count, stage = parameters(paper.network), paper.stages[0]
    for kind, sharding, whole, cut in (
        ("colossal", "zero1", 4, 12),
        ("colossal", "zero2", 2, 14),
        ("plain", "full", 0, 16),
    ):
        found = states(paper, changed(stage, kind=kind, sharding=sharding)).total
        assert found == pytest.approx(count * (whole + cut / 224))
    assert states(paper, changed(stage, kind="plain", sharding="none"), 1).total == count * (2 + 6 + 4 + 8)


def test_the_published_stages_fit_where_they_were_published() -> None:
    for name in available():
        recipe = Recipe.load(name, "paper")
        for stage in recipe.stages:
            assert m.fits(recipe, stage), (name, stage.name)
            fewest = m.min_devices(recipe, stage, m.available(stage.compute))
            assert fewest is not None
            assert fewest <= stage.compute.devices


def test_without_sharding_two_point_oh_fits_no_device(paper: Recipe) -> None:
    stage = changed(paper.stages[0], kind="plain", sharding="none")
    assert not m.fits(paper, stage)
    assert m.min_devices(paper, stage, m.usable(141)) is None
    assert m.largest_batch(paper, stage, LARGE, m.usable(141)) == 0
    assert any("zero2" in words for words in m.suggestions(paper, stage, m.usable(141)))


def test_the_largest_batch_is_the_last_that_fits(paper: Recipe) -> None:
    stage, space = paper.stages[0], m.usable(141)
    for cell in (LARGE, ("768px", 1)):
        batch = m.largest_batch(paper, stage, cell, space)
        assert m.memory(paper, stage, cell, batch).total <= space < m.memory(paper, stage, cell, batch + 1).total


def test_the_fewest_devices_are_the_first_that_fit(paper: Recipe) -> None:
    stage, space = paper.stages[2], m.usable(80)
    fewest = m.min_devices(paper, stage, space)
    assert fewest is not None
    assert fewest % stage.engine.sequence_parallel == 0
    assert m.fits(paper, stage, space, fewest)
    assert not m.fits(paper, stage, space, fewest - stage.engine.sequence_parallel)


def test_every_suggestion_fits(paper: Recipe) -> None:
    stage = changed(paper.stages[0], checkpoint_blocks=(0, 0))
    space = m.usable(141)
    assert not m.fits(paper, stage, space)
    words = m.suggestions(paper, stage, space)
    assert words[0].startswith("checkpoint_blocks: [100, 100]")
    assert m.suggestions(paper, stage, 2 * m.GIB) == []


def test_ranks_must_divide(paper: Recipe) -> None:
    with pytest.raises(m.MemoryModelError, match="6 ranks are no multiple of sequence x tensor x pipeline = 4"):
        m.memory(paper, paper.stages[2], LARGE, devices=6)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(m.MemoryModelError, match="no memory is known for 'T4'"):
        m.available(Compute(accelerators="T4:1", nodes=1, price="cpu-assume-2026"))


def test_a_cpu_is_shared_by_its_processes() -> None:
    compute = Compute(accelerators="CPU:4", nodes=1, price="cpu-assume-2026", processes=4)
    assert m.available(compute) == min(psutil.virtual_memory().total, m.cgroup_limit()) / 4


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/memory.max": "900", "a/b/memory.max": "max"}, 900),
        ("0::/gone/away\n", {"memory.max": "700"}, 700),
        ("5:cpu:/a\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "800", "cpu/a/memory.max": "1"}, 800),
        ("0::/a\n", {"a/memory.max": "max"}, math.inf),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    tmp_path: Path, groups: str, files: dict[str, str], limit: float
) -> None:
    texts = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert m.cgroup_limit(tmp_path) == limit
    assert m.cgroup_limit(tmp_path / "elsewhere") == math.inf


def cut_weights(names: list[str]) -> list[int]:
    """Weights of a rank of the tiny networks of recipes, after tensor parallelism cut them."""
    dist.init_process_group("gloo")
    found = []
    for name in names:
        network = build_network(Recipe.load(name, "tiny").network)
        assert dist.group.WORLD is not None
        shard_(network, dist.group.WORLD)
        found.append(num_parameters(network))
    dist.destroy_process_group()
    return found


def test_tensor_ranks_hold_what_is_estimated(ranks: Any) -> None:
    names = available()
    held, other = ranks(cut_weights, names)
    assert held == other
    for name, count in zip(names, held, strict=True):
        recipe = Recipe.load(name, "tiny")
        compute = recipe.stages[0].compute.model_copy(update={"processes": 2})
        stage = changed(recipe.stages[0], tensor_parallel=2).model_copy(update={"compute": compute})
        assert m.memory(recipe, stage, m.cells(stage)[0]).states.weights == 4 * count, name


def test_encoders_that_stand_beside_training_are_counted(paper: Recipe) -> None:
    stage = paper.stages[0]
    clips = stage.model_copy(update={"loading": Loading(source="clips")})
    both = clips.model_copy(update={"validation": Validation(every=1, clips=1, timesteps=1, prompts=("a cat",))})
    found = [m.memory(paper, each, LARGE).encoders for each in (stage, clips, both)]
    # Opened once, whoever asks.
    assert found == [0.0, 4 * (m.AUTOENCODER_WEIGHTS["hunyuan"] + m.TEXT_WEIGHTS["t5_clip"]), found[1]]
    beside = m.memory(paper, clips, LARGE)
    assert beside.total == m.memory(paper, stage, LARGE).total + found[1]


def test_weights_of_text_encoders_are_those_of_the_networks() -> None:
    from transformers import AutoModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sizes: dict[str, Any] = {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
    }
    clip: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    with torch.device("meta"):
        t5 = num_parameters(T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")))
        both = t5 + num_parameters(CLIPTextModel(CLIPTextConfig(**clip)))
    minilm = AutoModel.from_pretrained(packaged_minilm(), local_files_only=True)
    assert {"t5": t5, "t5_clip": both, "minilm": num_parameters(minilm)} == m.TEXT_WEIGHTS
    assert minilm.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_holds_what_is_estimated(precision: str) -> None:
    """Weights, masters and moments of the plain engine after a step, by the bytes of its own tensors."""
    recipe = Recipe.load("v2_0", "tiny")
    stage = changed(recipe.stages[0], precision=precision).model_copy(update={"ema_decay": None})
    network = build_network(recipe.network)
    engine = PlainEngine(torch.device("cpu"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], 1.0)
    engine.setup(network, adamw(stage.optimizer), schedule(stage.optimizer, 1))
    engine.backward(sum((weight.float().square().sum() for weight in network.parameters()), torch.zeros(())))
    engine.step()
    moments, masters = engine.moments(), engine.masters()
    told = m.memory(recipe, stage, m.cells(stage)[0]).states
    assert told.weights == size(dict(network.named_parameters()))
    assert told.moments == size(moments.mean) + size(moments.square)
    assert told.masters == (size(masters) if precision == "bf16" else 0)


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("v2_0", ("q_proj", "v_mlp", "img_mlp.0", "img_attn.proj")),
        ("v1_0", ("attn.qkv", "mlp.fc1", "attn_temp.proj")),
        ("v1_3", ("qkv", "cross_attn.kv_linear")),
    ],
)
def test_only_adapters_are_trained(name: str, targets: tuple[str, ...]) -> None:
    recipe = Recipe.load(name, "tiny")
    section = Lora(rank=4, alpha=4.0, targets=targets)
    network = build_network(recipe.network)
    whole = num_parameters(network)
    add_lora(network, section, 0)
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert adapter_lanes(recipe.network, targets) * section.rank == trained
    stage = recipe.stages[0].model_copy(update={"lora": section, "ema_decay": None})
    told = m.memory(recipe, stage, m.cells(stage)[0]).states
    assert (told.weights, told.moments) == (4 * (whole + trained), 8 * trained)


def test_a_phase_of_the_autoencoder_is_estimated_by_its_pixels() -> None:
    recipe = Recipe.load("v2_0", "tiny")
    (stage,) = recipe.autoencoder.stages
    assert isinstance(stage, AutoencoderStage)
    assert m.cells(stage) == [("64px", 5)]
    found = m.memory(recipe, stage, ("64px", 5))
    assert m.fits(recipe, stage)
    twice = stage.model_copy(update={"resolution": "128px"})
    assert m.memory(recipe, twice, ("128px", 5)).activations.peak == pytest.approx(4 * found.activations.peak)


def test_weights_of_autoencoders_are_those_of_the_networks() -> None:
    from ml.models.autoencoders.registry import build_autoencoder

    with torch.device("meta"):
        network: nn.Module = build_autoencoder(HunyuanNet())
    count = sum(weight.numel() for weight in network.parameters())
    assert count == pytest.approx(m.AUTOENCODER_WEIGHTS["hunyuan"], rel=0.01)
