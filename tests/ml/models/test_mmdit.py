"""The transformer of 2.0: the original's names, sizes and forward, identities of packing, and that it learns."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ml import architectures
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT, initialise, pack, unpack
from ml.models.rope import positions
from ml.models.sequence import PlainSequence
from ml.models.weights import Origin

SIZES = {
    "in_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 48,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": (4, 10, 10),
}
RELEASED = {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
SIZES |= RELEASED
VARIANTS = {
    "released": RELEASED,
    "flux": {"fused_qkv": True, "use_liger_rope": False, "guidance_embed": True, "cond_embed": False},
    "double only": {**RELEASED, "depth_single_blocks": 0},
    "dc-ae": {**RELEASED, "in_channels": 128, "patch_size": 1},
}


def _random(network: MMDiT) -> MMDiT:
    """Every parameter random, so that nothing is silently zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def network() -> MMDiT:
    return _random(MMDiT(**SIZES))


def _batch(batch: int = 2, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Tensor, Tensor, Inputs]:
    """Latents of 4 channels, times, and texts of 5 tokens."""
    g = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(s, generator=g) for s in ((batch, 4, *grid), (batch, 5, 20), (batch, 12)))
    text = Text(context, pooled, torch.ones(batch, 5, dtype=torch.bool))
    return x, torch.rand(batch, generator=g), Inputs(text, 8 * grid[1], 8 * grid[2], 4 * grid[0] - 3, 24.0)


def _doubled(inputs: Inputs) -> Inputs:
    return replace(inputs, text=inputs.text.to("cpu", torch.float64))


def _say(network: MMDiT, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    return denoise(network, network, x, t, inputs)


def _published(fused: bool, token: int, condition: int | None, guidance: bool) -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released weights, from the fact sheet; D 3072, head 128, 19 + 38 blocks."""
    d, linears, vectors = 3072, {}, {}
    linears |= {"img_in": (d, token), "txt_in": (d, 4096), "final_layer.linear": (token, d)}
    linears |= {"cond_in": (d, condition)} if condition else {}
    linears |= {"vector_in.in_layer": (d, 768), "final_layer.adaLN_modulation.1": (2 * d, d)}
    embedders = ("time_in", "guidance_in") if guidance else ("time_in",)
    linears |= {f"{name}.in_layer": (d, 256) for name in embedders}
    linears |= {f"{name}.out_layer": (d, d) for name in (*embedders, "vector_in")}
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linears |= {f"{block}_mod.lin": (6 * d, d), f"{block}_mlp.0": (4 * d, d), f"{block}_mlp.2": (d, 4 * d)}
            parts = {"qkv": (3 * d, d)} if fused else {name: (d, d) for name in ("q_proj", "k_proj", "v_proj")}
            linears |= {f"{block}_attn.{name}": shape for name, shape in {**parts, "proj": (d, d)}.items()}
            vectors |= {f"{block}_attn.norm.{name}.scale": (128,) for name in ("query_norm", "key_norm")}
    for i in range(38):
        block = f"single_blocks.{i}"
        split = {"q_proj": (d, d), "k_proj": (d, d), "v_mlp": (5 * d, d)}
        parts = {"linear1": (7 * d, d)} if fused else split
        linears |= {f"{block}.{name}": shape for name, shape in parts.items()}
        linears |= {f"{block}.linear2": (d, 5 * d), f"{block}.modulation.lin": (3 * d, d)}
        vectors |= {f"{block}.norm.{name}.scale": (128,) for name in ("query_norm", "key_norm")}
    vectors |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {f"{name}.weight": shape for name, shape in linears.items()} | vectors


@pytest.mark.parametrize(
    ("variant", "published"),
    [("released", (False, 64, 68, False)), ("flux", (True, 64, None, True)), ("dc-ae", (False, 128, 129, False))],
)
def test_names_and_shapes_are_the_released_ones(variant: str, published: tuple[bool, int, int | None, bool]) -> None:
    with torch.device("meta"):
        built = MMDiT(**VARIANTS[variant])
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == _published(*published)


def test_size_is_11_89_billion() -> None:
    """Closed form: 19 (36 D^2 + 30 D + 512) + 38 (15 D^2 + 11 D + 256) + embeddings and ends."""
    d = 3072
    blocks = 19 * (36 * d**2 + 30 * d + 512) + 38 * (15 * d**2 + 11 * d + 256)
    ends = d * (64 + 256 + 768 + 4096 + 68) + 2 * d**2 + 7 * d + (2 * d**2 + 2 * d) + (64 * d + 64)
    with torch.device("meta"):
        built = MMDiT(**RELEASED)
    assert sum(p.numel() for p in built.parameters()) == blocks + ends == 11_891_390_528


def test_a_section_and_its_fields_build_the_same_and_other_names_are_refused() -> None:
    section = architectures.MMDiT(**SIZES)
    assert MMDiT(section).config == MMDiT(**SIZES).config == section
    with pytest.raises(ValidationError, match="hidden"):
        MMDiT(hidden=48)
    with pytest.raises(ValidationError, match="add up to the head size 24"):
        MMDiT(**{**SIZES, "axes_dim": (4, 10, 8)})


def test_the_card_rebuilds_the_network(network: MMDiT) -> None:
    card = network.card(Origin("v2_0-tiny", "stage1"))
    assert (card.kind, card.origin.stage) == ("mmdit", "stage1")
    assert MMDiT(architectures.MMDiT.model_validate(card.config)).config == network.config
    assert network.null_context is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_says_a_velocity_of_every_latent(variant: str) -> None:
    hyper = {**SIZES, **VARIANTS[variant]}
    built = _random(MMDiT(**hyper))
    x, t, inputs = _batch()
    x = torch.randn(2, hyper["in_channels"] // hyper.get("patch_size", 2) ** 2, 3, 4, 6)
    out = _say(built, x, t, replace(inputs, guidance=4.0))
    assert out.shape == x.shape
    assert out.std() > 0.01


def test_guidance_is_required_where_it_was_distilled() -> None:
    distilled = _random(MMDiT(**SIZES, guidance_embed=True))
    x, t, inputs = _batch()
    with pytest.raises(ValueError, match="guidance"):
        _say(distilled, x, t, inputs)
    weak, strong = (_say(distilled, x, t, replace(inputs, guidance=value)) for value in (1.0, 4.0))
    assert not torch.allclose(weak, strong, atol=1e-3)


def test_denoise_is_the_original_forward_by_hand(network: MMDiT) -> None:
    """Tokens, ids and condition built once more as the original's sampler does (ou/sampling.py, main)."""
    x, t, inputs = _batch()
    condition = torch.randn(2, 5, 3, 4, 6)
    said = _say(network, x, t, replace(inputs, condition=condition))

    def tokens(latents: Tensor) -> Tensor:
        rows = [
            latents[:, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            for f in range(3)
            for i in range(2)
            for j in range(3)
        ]
        return torch.stack(rows, dim=1)

    ids = torch.tensor([[f, i, j] for f in range(3) for i in range(2) for j in range(3)]).float().expand(2, -1, -1)
    out = network(
        img=tokens(x),
        img_ids=ids,
        txt=inputs.text.context,
        txt_ids=torch.zeros(2, 5, 3),
        timesteps=t,
        y_vec=inputs.text.pooled,
        cond=tokens(condition),
        seq_align=1,
    )
    assert out.shape == (2, 18, 16)
    assert torch.allclose(tokens(said), out, atol=1e-6)


def test_packing_and_unpacking_are_inverse_and_channel_is_slowest() -> None:
    x = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6)
    tokens = pack(x, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 4)
    assert torch.equal(unpack(tokens, (2, 4, 6), 2), x)
    assert torch.equal(tokens[1, 4], x[1, :, 0, 2:4, 2:4].flatten())


def test_positions_follow_the_order_of_packing() -> None:
    grid = torch.zeros(1, 3, 2, 4, 6, dtype=torch.int64)
    for axis, values in enumerate(torch.meshgrid(*(torch.arange(n) for n in (2, 4, 6)), indexing="ij")):
        grid[0, axis] = values
    first_pixels = pack(grid, 2)[0, :, ::4] // torch.tensor([1, 2, 2])
    assert torch.equal(positions((2, 2, 3), torch.device("cpu")), first_pixels)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fresh_network_says_nothing_and_ignores_its_condition(fused: bool) -> None:
    fresh = MMDiT(**{**SIZES, "fused_qkv": fused})
    assert (_say(fresh, *_batch()) == 0).all()
    assert (fresh.cond_in.weight == 0).all()
    assert (fresh.cond_in.bias == 0).all()


def test_both_layouts_start_alike() -> None:
    """From the same seed: fused projections are drawn part by part, each by its own Xavier bound."""
    states = []
    for fused in (False, True):
        fresh = MMDiT(**{**SIZES, "fused_qkv": fused})
        torch.manual_seed(3)
        initialise(fresh)
        states.append(fresh.state_dict())
    for block, parts, whole in (
        ("double_blocks.1.txt_attn", ("q_proj", "k_proj", "v_proj"), "qkv"),
        ("single_blocks.2", ("q_proj", "k_proj", "v_mlp"), "linear1"),
    ):
        split = torch.cat([states[0][f"{block}.{part}.weight"] for part in parts])
        assert torch.equal(states[1][f"{block}.{whole}.weight"], split)
        bound = (6 / (48 + 48)) ** 0.5
        assert 0.95 * bound < split[:48].abs().max() <= bound


def test_no_condition_is_a_condition_of_zeros(network: MMDiT) -> None:
    x, t, inputs = _batch()
    given = torch.zeros(2, 5, 3, 4, 6)
    plain = _say(network, x, t, inputs)
    assert torch.equal(plain, _say(network, x, t, replace(inputs, condition=given)))
    arguments = network.arguments(x, t, inputs)
    assert torch.equal(network(**arguments), network(**{**arguments, "cond": None}))
    given[:, :, 0] = 1.0
    assert not torch.allclose(plain, _say(network, x, t, replace(inputs, condition=given)))


def test_a_network_without_a_condition_ignores_it() -> None:
    built = _random(MMDiT(**{**SIZES, "cond_embed": False}))
    x, t, inputs = _batch()
    given = replace(inputs, condition=torch.ones(2, 5, 3, 4, 6))
    assert torch.equal(_say(built, x, t, inputs), _say(built, x, t, given))


@pytest.mark.parametrize("argument", ["img", "img_ids", "txt", "txt_ids", "timesteps", "y_vec", "cond"])
def test_every_input_matters_and_rows_do_not_mix(network: MMDiT, argument: str) -> None:
    arguments = network.arguments(*_batch())
    before = network(**arguments)
    changed = arguments[argument].float()
    if argument.endswith("ids"):
        changed[1] = changed[1] * 3 + torch.arange(changed.shape[1])[:, None]
    else:
        changed[1] += 0.5
    after = network(**{**arguments, argument: changed})
    assert torch.allclose(before[0], after[0], atol=1e-5)
    assert not torch.allclose(before[1], after[1], atol=1e-4)


@pytest.mark.parametrize("half_split", [True, False])
def test_only_distances_between_positions_count(half_split: bool) -> None:
    """Moving every token, text too, by the same way changes nothing; moving the picture alone does."""
    built = _random(MMDiT(**{**SIZES, "use_liger_rope": half_split})).double()
    x, t, inputs = _batch()
    arguments = built.arguments(x.double(), t.double(), _doubled(inputs))
    way, here = torch.tensor([7, 2, 11]), built(**arguments)
    moved = {**arguments, "img_ids": arguments["img_ids"] + way}
    assert not torch.allclose(built(**moved), here, atol=1e-5)
    assert torch.allclose(built(**{**moved, "txt_ids": arguments["txt_ids"] + way}), here, atol=1e-10)


def test_text_has_no_position(network: MMDiT) -> None:
    """Text tokens all sit at (0,0,0), so their order cannot matter; the order of frames does."""
    x, t, inputs = _batch()
    network.double()
    x, t, inputs = x.double(), t.double(), _doubled(inputs)
    shuffled = replace(inputs, text=replace(inputs.text, context=inputs.text.context.flip(1)))
    expected = _say(network, x, t, inputs)
    assert torch.allclose(expected, _say(network, x, t, shuffled), atol=1e-12)
    assert not torch.allclose(expected, _say(network, x.flip(2), t, inputs).flip(2), atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointed_blocks_give_the_same_outputs_and_gradients(fused: bool) -> None:
    grads, outputs = [], []
    for settings in (None, (1, 2), (19, 38)):
        built = _random(MMDiT(**{**SIZES, "fused_qkv": fused, "grad_ckpt_settings": settings}))
        assert built.checkpoint_blocks == (settings or (0, 0))
        outputs.append(_say(built, *_batch()))
        outputs[-1].square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in built.parameters()]))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert (grads[0] != 0).float().mean() > 0.98


def test_checkpointing_runs_the_stated_blocks_twice(network: MMDiT) -> None:
    runs: dict[str, int] = {}
    blocks = {f"double {i}": b for i, b in enumerate(network.double_blocks)}
    blocks |= {f"single {i}": b for i, b in enumerate(network.single_blocks)}
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    network.checkpoint_blocks = (1, 2)
    _say(network, *_batch()).sum().backward()
    assert runs == {"double 0": 2, "double 1": 1, "single 0": 2, "single 1": 2, "single 2": 1}


def test_a_sequence_engine_is_asked_to_split_attend_and_gather(network: MMDiT) -> None:
    class Spy(PlainSequence):
        def __init__(self) -> None:
            self.split_sizes: list[int] = []
            self.attended = 0
            self.gathered = 0

        def split(self, x: Tensor, dim: int) -> Tensor:
            self.split_sizes.append(x.shape[dim])
            return x

        def gather(self, x: Tensor, dim: int, tokens: int) -> Tensor:
            self.gathered += 1
            return x

        def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
            self.attended += 1
            return super().attention(query, key, value, tokens)

    expected, network.sp = _say(network, *_batch()), Spy()
    assert torch.equal(_say(network, *_batch()), expected)
    assert sorted(network.sp.split_sizes) == [5, 5, 18, 18, 18]
    assert (network.sp.attended, network.sp.gathered) == (5, 1)


def test_two_ranks_that_split_tokens_agree_with_one(network: MMDiT) -> None:
    """A sequence engine in one process: both halves run in lockstep threads and exchange keys and values."""
    network.double()
    x, t, inputs = _batch(grid=(2, 4, 4))
    x, t, inputs = x.double(), t.double(), _doubled(inputs)
    expected, barrier, shared, results = (_say(network, x, t, inputs), threading.Barrier(2, timeout=60), {}, {})

    class Half(PlainSequence):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def split(self, x: Tensor, dim: int) -> Tensor:
            return x.chunk(2, dim)[self.rank]

        def exchange(self, x: Tensor, dim: int) -> Tensor:
            shared[self.rank] = x
            barrier.wait()
            joined = torch.cat([shared[0], shared[1]], dim)
            barrier.wait()
            return joined

        def gather(self, x: Tensor, dim: int, tokens: int) -> Tensor:
            return self.exchange(x, dim)

        def attention(self, query: Tensor, key: Tensor, value: Tensor, tokens: Sequence[int]) -> Tensor:
            return super().attention(query, self.exchange(key, 2), self.exchange(value, 2), tokens)

    def rank(index: int) -> None:
        copy = MMDiT(network.config).double()
        copy.load_state_dict(network.state_dict())
        copy.sp = Half(index)
        with torch.no_grad():
            results[index] = _say(copy, x, t, inputs)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert torch.allclose(results[index], expected, atol=1e-10)


def test_a_tiny_network_learns_to_tell_texts_apart() -> None:
    """Two texts, two constant targets: forty steps must take most of the loss away."""
    torch.manual_seed(0)
    built, (x, t, inputs) = MMDiT(**SIZES), _batch(grid=(1, 4, 4))
    wanted = torch.stack([torch.ones(4, 1, 4, 4), -torch.ones(4, 1, 4, 4)])
    optimizer = torch.optim.AdamW(built.parameters(), lr=4e-3)
    losses = []
    for _ in range(40):
        loss = (_say(built, x, t, inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0)
    assert losses[-1] < 0.1
