"""The estimate against what the networks really keep: every storage that is alive after a forward pass, counted."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ml import architectures as a
from ml.activations import Activations, _latents, autoencoder_activations, stage_activations
from ml.methods import Engine
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.inputs import Inputs, Text
from ml.models.networks import build_network
from ml.models.recompute import Recompute
from ml.recipe import Recipe

WIDE = {"hidden_size": 96, "num_heads": 4}
SPLIT = {**WIDE, "depth": 2, "depth_single_blocks": 4, "axes_dim": (4, 10, 10), "in_channels": 16, "cond_embed": True}
SPLIT |= {"context_in_dim": 32, "vec_in_dim": 32, "fused_qkv": False, "use_liger_rope": True}
OLD = {**WIDE, "depth": 4, "caption_channels": 32}
WINDOWS = {**OLD, "in_channels": 16, "use_spatial_rope": True}
NETWORKS: dict[str, a.Model] = {
    "mmdit": a.MMDiT.model_validate(SPLIT),
    "mmdit fused": a.MMDiT.model_validate({**SPLIT, "fused_qkv": True, "use_liger_rope": False}),
    "mmdit narrow mlp": a.MMDiT.model_validate({**SPLIT, "mlp_ratio": 2.0}),
    "stdit": a.STDiT.model_validate(OLD),
    "stdit2": a.STDiT2.model_validate({**OLD, "qk_norm": True}),
    "stdit2 without norms": a.STDiT2.model_validate(OLD),
    "stdit3": a.STDiT3.model_validate(OLD),
    "stdit3 rope first": a.STDiT3.model_validate({**OLD, "qk_norm_legacy": True}),
    "stdit3 images": a.STDiT3.model_validate({**OLD, "skip_temporal": True}),
    "windowed": a.STDiT3.model_validate({**WINDOWS, "kernel_size": (4, 4, -1)}),
    "windowed, padded": a.STDiT3.model_validate({**WINDOWS, "kernel_size": (3, 3, -1)}),
}
GRIDS, TEXT = ((4, 16, 16), (8, 16, 16)), 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Live(TorchDispatchMode):
    """Counts the bytes of every storage made within it that is still alive: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._known:
                continue
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def engine(precision: str, blocks: tuple[int, int] = (0, 0), recompute: str = "block", **more: Any) -> Engine:
    named = {"kind": "plain", "precision": precision, "grad_clip": 1.0, "accumulate": 1, "sequence_parallel": 1}
    return Engine.model_validate({**named, "checkpoint_blocks": blocks, "recompute": recompute, **more})


def counted(model: a.Model, grid: tuple[int, int, int], section: Engine) -> Activations:
    """What a network of the house keeps after its forward pass, and what more there is at the widest moment."""
    torch.manual_seed(0)
    network, dtype = build_network(model), DTYPES[section.precision]
    network.checkpoint_blocks, network.recompute = section.checkpoint_blocks, Recompute(section.recompute)
    network.to(dtype)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    joint = isinstance(model, a.MMDiT)
    channels = model.in_channels // model.patch_size**2 if isinstance(model, a.MMDiT) else model.in_channels
    x = torch.randn(1, channels, *grid, dtype=dtype)
    context, pooled = torch.randn(1, TEXT, 32, dtype=dtype), torch.randn(1, 32 if joint else 1, dtype=dtype)
    text = Text(context, pooled, torch.ones(1, TEXT, dtype=torch.bool))
    inputs = Inputs(text, grid[1] * 8, grid[2] * 8, grid[0], torch.full((1,), 24.0))
    given = network.arguments(x, torch.full((1,), 0.5), inputs)
    return passed(lambda: network(**given).float().square().mean())


def passed(loss_of: Callable[[], Tensor]) -> Activations:
    """A forward and a backward pass, counted."""
    gc.collect()
    with Live() as live:
        loss = loss_of()
        kept = live.now
        torch.autograd.backward(loss)
    return Activations(kept, live.peak - kept)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_bytes_are_those_that_are_alive(name: str) -> None:
    """With every block kept, a part of them and none, in both precisions; without what a step adds around."""
    model = NETWORKS[name]
    kept, parts, none = (0, 0), (2, 2), (100, 100)
    for precision, grid, blocks in (
        ("fp32", GRIDS[0], kept),
        ("bf16", GRIDS[1], kept),
        ("bf16", GRIDS[0], parts),
        ("fp32", GRIDS[0], none),
    ):
        section = engine(precision, blocks)
        found, told = counted(model, grid, section), stage_activations(model, grid, TEXT, section)
        assert told.kept - _latents(model, grid) == pytest.approx(found.kept, rel=0.02), (precision, grid, blocks)
        assert 0.97 < (told.peak - _latents(model, grid)) / found.peak < 1.13, (precision, grid, blocks)


@pytest.mark.parametrize("name", ["mmdit", "stdit", "stdit2", "stdit3", "windowed"])
def test_selective_recomputation_keeps_what_products_gave(name: str) -> None:
    model = NETWORKS[name]
    for precision, grid in zip(DTYPES, GRIDS, strict=True):
        section = engine(precision, (100, 100), "selective")
        found, told = counted(model, grid, section), stage_activations(model, grid, TEXT, section)
        assert told.kept - _latents(model, grid) == pytest.approx(found.kept, rel=0.05)
        assert 0.95 < (told.peak - _latents(model, grid)) / found.peak < 1.15


def test_published_sizes_keep_the_published_bytes() -> None:
    """Nothing made again: 54 and 46 bytes a token and width in bf16, as the module states; 2 where it is."""
    model = Recipe.load("v2_0", "paper").network
    assert isinstance(model, a.MMDiT)
    grid, values = (33, 32, 32), (33 * 16 * 16 + 512) * 3072
    blocks = {(0, 0): 19 * 54 + 38 * 46, (100, 100): 57 * 2, (8, 100): 8 * 2 + 11 * 54 + 38 * 2}
    for chosen, expected in blocks.items():
        kept = stage_activations(model, grid, 512, engine("bf16", chosen)).kept
        assert kept / values == pytest.approx(expected, rel=0.1)


def test_ranks_that_share_an_example_share_what_it_keeps() -> None:
    model, grid = NETWORKS["mmdit"], GRIDS[1]
    whole = stage_activations(model, grid, TEXT, engine("bf16"))
    cut = stage_activations(model, grid, TEXT, engine("bf16", sequence_parallel=4))
    around = _latents(model, grid)
    assert cut.kept - around == pytest.approx((whole.kept - around) / 4)
    tensor = stage_activations(model, grid, TEXT, engine("bf16", tensor_parallel=2))
    assert whole.kept / 2 < tensor.kept < 0.75 * whole.kept


def test_offloaded_activations_are_the_hosts() -> None:
    model, grid = NETWORKS["stdit3"], GRIDS[1]
    kept, parked = (stage_activations(model, grid, TEXT, engine("bf16", (4, 0), offload=o)) for o in (False, True))
    assert (kept.host, parked.host) == (0.0, pytest.approx(kept.kept - parked.kept))
    assert parked.kept < kept.kept


SMALL_NETS = {
    "sd": ({"block_out_channels": (128, 256, 512, 512)}, 5),
    "opensora_v1_2": ({"micro_frame_size": 17}, 17),
    "opensora_v1_3": ({"micro_frame_size": 17}, 17),
    "hunyuan": ({}, 17),
}


@pytest.mark.parametrize("kind", SMALL_NETS)
def test_autoencoders_keep_what_is_alive(kind: str) -> None:
    """At published widths, shapes alone (the meta device)."""
    given, frames = SMALL_NETS[kind]
    recipe = Recipe.load({"sd": "v1_0", "opensora_v1_2": "v1_2", "opensora_v1_3": "v1_3", "hunyuan": "v2_0"}[kind])
    net = type(recipe.autoencoder.net).model_validate({"kind": kind, **given})
    stage = recipe.autoencoder.stages[-1].model_copy(update={"frames": frames})
    with torch.device("meta"):
        network: nn.Module = build_autoencoder(net)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    video = torch.zeros(1, 3, frames, 128, 128, device="meta")
    found = passed(lambda: network(video).video.square().mean())
    told = autoencoder_activations(net, stage).kept * 128 * 128
    assert told == pytest.approx(found.peak, rel=0.1)
