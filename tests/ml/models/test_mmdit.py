"""The transformer: released names and size, identities of packing, and that it learns."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ml.models.mmdit import MMDiT, PlainSequence, build_mmdit, load_mmdit, pack, positions, save_mmdit, unpack
from ml.models.weights import CheckpointMismatch, Origin
from ml.recipe import Recipe

PAPER = Recipe.load("v2_0", "paper")
TINY = Recipe.load("v2_0", "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network() -> MMDiT:
    """A tiny network whose every parameter is random, so that nothing is silently zero."""
    torch.manual_seed(0)
    built = build_mmdit(TINY.model, TINY.text, 16)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return built


def _inputs(batch: int = 2, grid: tuple[int, int, int] = (3, 4, 6), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, 16, *grid), (batch,), (batch, 48, 384), (batch, 384)]
    return [
        torch.rand(s, generator=g).to(dtype) if len(s) == 1 else torch.randn(s, generator=g).to(dtype) for s in shapes
    ]


def _published() -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released weights, from the fact sheet; D 3072, head 128, 19 + 38 blocks."""
    d, linears, vectors = 3072, {}, {}
    linears |= {"img_in": (d, 64), "txt_in": (d, 4096), "cond_in": (d, 68), "final_layer.linear": (64, d)}
    linears |= {
        "time_in.in_layer": (d, 256),
        "vector_in.in_layer": (d, 768),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    linears |= {f"{name}.out_layer": (d, d) for name in ("time_in", "vector_in")}
    for i in range(19):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linears |= {f"{block}_mod.lin": (6 * d, d), f"{block}_mlp.0": (4 * d, d), f"{block}_mlp.2": (d, 4 * d)}
            linears |= {f"{block}_attn.{name}": (d, d) for name in ("q_proj", "k_proj", "v_proj", "proj")}
            vectors |= {f"{block}_attn.norm.{name}.scale": (128,) for name in ("query_norm", "key_norm")}
    for i in range(38):
        block = f"single_blocks.{i}"
        linears |= {f"{block}.{name}": (d, d) for name in ("q_proj", "k_proj")}
        linears |= {f"{block}.v_mlp": (5 * d, d), f"{block}.linear2": (d, 5 * d), f"{block}.modulation.lin": (3 * d, d)}
        vectors |= {f"{block}.norm.{name}.scale": (128,) for name in ("query_norm", "key_norm")}
    vectors |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return {f"{name}.weight": shape for name, shape in linears.items()} | vectors


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        built = build_mmdit(PAPER.model, PAPER.text, 16)
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == _published()


def test_size_is_11_89_billion() -> None:
    """Closed form: 19 (36 D^2 + 30 D + 512) + 38 (15 D^2 + 11 D + 256) + embeddings and ends."""
    d = 3072
    blocks = 19 * (36 * d**2 + 30 * d + 512) + 38 * (15 * d**2 + 11 * d + 256)
    ends = d * (64 + 256 + 768 + 4096 + 68) + 2 * d**2 + 7 * d + (2 * d**2 + 2 * d) + (64 * d + 64)
    with torch.device("meta"):
        built = build_mmdit(PAPER.model, PAPER.text, 16)
    assert sum(p.numel() for p in built.parameters()) == blocks + ends == 11_891_390_528


def test_guidance_embedding_is_optional_and_then_required() -> None:
    distilled = build_mmdit(TINY.model.model_copy(update={"guidance_embed": True}), TINY.text, 16)
    assert any(name.startswith("guidance_in.in_layer") for name in distilled.state_dict())
    with pytest.raises(ValueError, match="guidance"):
        distilled(*_inputs())
    assert distilled(*_inputs(), guidance=torch.tensor([4.0, 4.0])).shape == (2, 16, 3, 4, 6)


def test_packing_and_unpacking_are_inverse_and_channel_is_slowest() -> None:
    x = torch.arange(2 * 3 * 2 * 4 * 6).reshape(2, 3, 2, 4, 6)
    tokens = pack(x, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 4)
    assert torch.equal(unpack(tokens, (2, 4, 6), 2), x)
    assert torch.equal(tokens[1, 4], x[1, :, 0, 2:4, 2:4].flatten())


def test_positions_follow_the_order_of_packing() -> None:
    grid = torch.zeros(1, 3, 2, 4, 6)
    for axis, values in enumerate(torch.meshgrid(*(torch.arange(n) for n in (2, 4, 6)), indexing="ij")):
        grid[0, axis] = values
    first_pixels = pack(grid, 2)[0, :, ::4] / torch.tensor([1, 2, 2])
    assert torch.equal(positions((2, 2, 3), torch.device("cpu")), first_pixels)


def test_a_fresh_network_says_nothing_and_ignores_its_condition() -> None:
    torch.manual_seed(0)
    fresh = build_mmdit(TINY.model, TINY.text, 16)
    assert (fresh(*_inputs()) == 0).all()
    assert (fresh.cond_in.weight == 0).all()
    assert (fresh.cond_in.bias == 0).all()


def test_no_condition_is_a_condition_of_zeros(network: MMDiT) -> None:
    inputs, nothing = _inputs(), torch.zeros(2, 17, 3, 4, 6)
    assert torch.equal(network(*inputs), network(*inputs, nothing))
    given = nothing.clone()
    given[:, :, 0] = 1.0
    assert not torch.allclose(network(*inputs), network(*inputs, given))


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_every_input_matters_and_rows_do_not_mix(network: MMDiT, argument: int) -> None:
    inputs = _inputs()
    before = network(*inputs)
    inputs[argument] = inputs[argument].clone()
    inputs[argument][1] += 0.5
    after = network(*inputs)
    assert torch.allclose(before[0], after[0], atol=1e-6)
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_text_has_no_position(network: MMDiT) -> None:
    """Text tokens all sit at (0,0,0), so their order cannot matter; the order of frames does."""
    inputs = [value.double() for value in _inputs()]
    network.double()
    shuffled = [inputs[0], inputs[1], inputs[2].flip(1), inputs[3]]
    assert torch.allclose(network(*inputs), network(*shuffled), atol=1e-12)
    flipped = [inputs[0].flip(2), *inputs[1:]]
    assert not torch.allclose(network(*inputs), network(*flipped).flip(2), atol=1e-6)


def test_checkpointed_blocks_give_the_same_gradients(network: MMDiT) -> None:
    grads = []
    for blocks in ((0, 0), (1, 3)):
        network.checkpoint_blocks = blocks
        network.zero_grad()
        network(*_inputs()).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.equal(*grads)
    assert (grads[0] != 0).float().mean() > 0.99


def test_a_sequence_engine_is_asked_to_split_attend_and_gather(network: MMDiT) -> None:
    class Spy(PlainSequence):
        def __init__(self) -> None:
            self.split_sizes: list[int] = []
            self.attended = 0
            self.gathered = 0

        def split(self, x: Tensor, dim: int) -> Tensor:
            self.split_sizes.append(x.shape[dim])
            return x

        def gather(self, x: Tensor, dim: int) -> Tensor:
            self.gathered += 1
            return x

        def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.attended += 1
            return super().attention(query, key, value)

    expected, network.sp = network(*_inputs()), Spy()
    assert torch.equal(network(*_inputs()), expected)
    assert sorted(network.sp.split_sizes) == [18, 18, 48, 48]
    assert (network.sp.attended, network.sp.gathered) == (6, 1)


def test_two_ranks_that_split_tokens_agree_with_one(network: MMDiT) -> None:
    """A sequence engine in one process: both halves run in lockstep threads and exchange keys and values."""
    import threading

    network.double()
    inputs = [value.double() for value in _inputs(grid=(2, 4, 4))]
    expected, barrier, shared, results = network(*inputs), threading.Barrier(2, timeout=60), {}, {}

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

        def gather(self, x: Tensor, dim: int) -> Tensor:
            return self.exchange(x, dim)

        def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return super().attention(query, self.exchange(key, 2), self.exchange(value, 2))

    def rank(index: int) -> None:
        copy = build_mmdit(TINY.model, TINY.text, 16).double()
        copy.load_state_dict(network.state_dict())
        copy.sp = Half(index)
        with torch.no_grad():
            results[index] = copy(*inputs)

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
    built = build_mmdit(TINY.model, TINY.text, 16)
    x, t, context, pooled = _inputs(batch=2, grid=(1, 4, 4))
    wanted = torch.stack([torch.ones(16, 1, 4, 4), -torch.ones(16, 1, 4, 4)])
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = (built(x, t, context, pooled) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0)
    assert losses[-1] < 0.1


def test_weights_survive_a_round_trip_and_refuse_another_network(network: MMDiT, tmp_path: Path) -> None:
    save_mmdit(tmp_path, network, Origin("v2_0-tiny", "stage1"))
    other = build_mmdit(TINY.model, TINY.text, 16)
    assert load_mmdit(tmp_path, other, "v2_0-tiny").origin.stage == "stage1"
    assert torch.equal(other(*_inputs()), network(*_inputs()))
    with pytest.raises(CheckpointMismatch, match=re.escape("recipe is 'v2_0-tiny', wanted 'v1_2-tiny'")):
        load_mmdit(tmp_path, other, "v1_2-tiny")
    wider = build_mmdit(TINY.model.model_copy(update={"single_blocks": 5}), TINY.text, 16)
    with pytest.raises(CheckpointMismatch, match="config single_blocks is 4, wanted 5"):
        load_mmdit(tmp_path, wider, "v2_0-tiny")
