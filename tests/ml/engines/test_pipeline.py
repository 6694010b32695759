"""Stages of every transformer, run by the ColossalAI engine in as many ranks: what the whole network computes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist

from ml.engines.make import make_engine
from ml.engines.pipeline import Elsewhere, cuts, running_order, streams_of
from ml.engines.protocol import Engine, EngineError, Moments
from ml.entry import Call
from ml.methods import Engine as EngineSection
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT
from ml.models.stdit import STDiT
from ml.models.stdit2 import STDiT2
from ml.models.stdit3 import STDiT3
from ml.sections import Adam, Compute
from ml.train import train_stage
from ml.training.optim import adamw, schedule

ADAM = Adam(lr=1e-2, eps=1e-6, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=3)
SECTION = {"kind": "colossal", "precision": "fp32", "grad_clip": 0.5, "accumulate": 1, "sequence_parallel": 1}
SHAPE, TOKENS, WIDTH = (2, 4, 2, 4, 4), 6, 48
DIT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": 8,
    "model_max_length": TOKENS,
}
MAKERS: dict[str, Callable[[], Any]] = {
    "mmdit": lambda: MMDiT(
        in_channels=16,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=WIDTH,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(8, 8, 8),
    ),
    "stdit": lambda: STDiT(**DIT, input_size=SHAPE[2:], class_dropout_prob=0.0, drop_path=0.0),
    "stdit2": lambda: STDiT2(**DIT, class_dropout_prob=0.0, drop_path=0.0),
    "stdit3": lambda: STDiT3(**DIT, class_dropout_prob=0.0, drop_path=0.0),
}

Ranks = Callable[..., list[Any]]


def new_network(name: str) -> Any:
    """A small network whose every weight says something; the same in any process."""
    torch.manual_seed(1)
    network = MAKERS[name]()
    network.checkpoint_blocks = (1, 1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return network


def asked(model: nn.Module, network: Any, number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a network says about batch `number`."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(SHAPE, generator=generator).to(dtype)
    context, pooled = (torch.randn(2, *size, generator=generator) for size in ((TOKENS, 8), (8,)))
    text = Text(context, pooled, torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [2]])).to("cpu", dtype)
    inputs = Inputs(text, height=32, width=32, frames=2, fps=torch.full((2,), 24.0))
    return denoise(model, network, latents, torch.tensor([0.3, 0.8]), inputs).float()


def new_engine(network: nn.Module, stages: int, ranks: int, **over: Any) -> Engine:
    section = EngineSection.model_validate(
        {**SECTION, "checkpoint_blocks": (1, 1), "pipeline_parallel": stages, **over}
    )
    engine = make_engine(section, Compute(accelerators="CPU:1", nodes=1, price="x", processes=ranks))
    engine.setup(network, adamw(ADAM), schedule(ADAM, 10))
    return engine


def freeze_all_but_blocks(network: nn.Module) -> None:
    network.requires_grad_(False)
    for blocks, index in running_order(network):
        blocks[index].requires_grad_(True)


class Watching:
    """Runs blocks and says in which order."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def run(self, block: nn.Module, chosen: bool, *given: Any) -> Any:
        out = block(*given)
        self.ran.append((block, len(out) if isinstance(out, tuple) else 1))
        return out


@pytest.mark.parametrize("name", MAKERS)
def test_blocks_are_cut_in_the_order_in_which_they_run(name: str) -> None:
    network = new_network(name)
    network.recompute = Watching()
    asked(network, network, 0)
    blocks = [blocks[index] for blocks, index in running_order(network)]
    assert network.recompute.ran == [(block, streams_of(block)) for block in blocks]
    assert [streams_of(Elsewhere(block)) for block in blocks] == [streams for _, streams in network.recompute.ran]


@pytest.mark.parametrize(
    ("sizes", "stages", "starts"),
    [
        ([1, 1, 1, 1], 2, [0, 2]),
        ([2, 2, 1, 1], 2, [0, 1]),
        ([2, 2, 1, 1, 1, 1], 4, [0, 1, 2, 4]),
        ([10, 1, 1], 3, [0, 1, 2]),
        ([1, 1, 10], 2, [0, 2]),
        ([3], 1, [0]),
    ],
)
def test_stages_are_as_even_as_can_be_and_never_empty(sizes: list[int], stages: int, starts: list[int]) -> None:
    assert cuts(sizes, stages) == starts


def against_the_whole(name: str, stages: int, frozen: bool) -> tuple[float, float, int, list[str]]:
    """Largest difference of outputs and of gradients, how many weights are here, and the names of those of blocks."""
    whole, network = new_network(name), new_network(name)
    if frozen:
        freeze_all_but_blocks(whole)
        freeze_all_but_blocks(network)
    engine = new_engine(network, stages, stages)
    with torch.no_grad():
        apart = float((asked(engine.model, network, 3) - asked(whole, whole, 3)).abs().max())
    outputs = [(asked(engine.model, network, number), asked(whole, whole, number)) for number in (4, 5)]
    apart = max(apart, *(float((mine - theirs).detach().abs().max()) for mine, theirs in outputs))
    # Two forwards before one backward, as an objective may.
    engine.backward(sum(mine.square().mean() for mine, _ in outputs))  # type: ignore[arg-type]
    sum(theirs.square().mean() for _, theirs in outputs).backward()  # type: ignore[union-attr]
    wanted, off, own = dict(whole.named_parameters()), 0.0, []
    lists = tuple(f"{child}." for child, module in network.named_children() if isinstance(module, nn.ModuleList))
    for weight_name, weight in network.named_parameters():
        gradient, true = weight.grad, wanted[weight_name].grad
        assert (gradient is None) == (true is None), weight_name
        if gradient is None or true is None:
            continue
        if weight_name.startswith(lists):
            own.append(weight_name)
        else:
            dist.all_reduce(gradient)
        off = max(off, float((gradient - true).abs().max() / true.abs().max().clamp(min=1e-3)))
    numel = sum(weight.numel() for weight in network.parameters())
    engine.close()
    return apart, off, numel, own


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [("mmdit", 4, False), ("mmdit", 2, True), ("stdit", 2, False), ("stdit2", 2, False), ("stdit3", 3, False)],
)
def test_stages_together_compute_what_the_whole_network_does(
    ranks: Ranks, name: str, stages: int, frozen: bool
) -> None:
    """Also where a stage ends between double and single blocks, or between a spatial and its temporal block."""
    whole = new_network(name)
    blocks = {w for place, index in running_order(whole) for w in place[index].parameters()}
    in_blocks, outside = (sum(w.numel() for w in whole.parameters() if (w in blocks) == wanted) for wanted in (1, 0))
    found = ranks(against_the_whole, name, stages, frozen, count=stages)
    assert max(apart for apart, *_ in found) < 1e-5
    assert max(off for _, off, *_ in found) < 1e-4
    # Every block is on one rank, and what is outside the blocks on all.
    assert sum(numel - outside for _, _, numel, _ in found) == in_blocks
    assert all(numel < outside + in_blocks * 0.7 for _, _, numel, _ in found)
    own = [name for *_, names in found for name in names]
    assert len(own) == len(set(own)) == len(blocks)


@pytest.mark.parametrize("name", ["mmdit", "stdit3"])
def test_two_stages_take_the_twenty_steps_of_one_process(curves: Callable[..., Any], name: str) -> None:
    curves(name, {"kind": "colossal", "pipeline_parallel": 2}, 2).agrees(curves(name, {}))


def train(engine: Engine, network: Any, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step: of two batches, over data ranks or one after the other."""
    rows = []
    for step in steps:
        losses = []
        for number in range(2 * step + engine.data_rank, 2 * step + 2, engine.data_size):
            with engine.accumulate(last=number + engine.data_size >= 2 * step + 2):
                loss = asked(engine.model, network, number, engine.dtype).square().mean()
                engine.backward(loss * engine.data_size / 2)
            losses.append(float(loss.detach()))
        rows.append((engine.total([sum(losses)])[0] * engine.data_size / engine.size / 2, engine.step()))
    return rows


def everything(engine: Engine) -> tuple[dict[str, Tensor], Moments]:
    moments = engine.moments()
    mean, square = engine.gather(moments.mean), engine.gather(moments.square)
    updates = {name: count for found in engine.collect(dict(moments.updates)) for name, count in found.items()}
    return engine.gather(engine.masters()), Moments(mean, square, updates)


def through(over: dict[str, Any], layout: tuple[int, int], steps: range, start: Any = None) -> tuple[Any, Any]:
    """Train on (stages, ranks) from a saved state, or afresh; what happened, and the state at the end."""
    network = new_network("mmdit")
    engine = new_engine(network, *layout, **over)
    if start is not None:
        engine.restore(start[0], start[1], steps.start)
    found = train(engine, network, steps), everything(engine)
    engine.close()
    return found


def alike(ours: Any, theirs: Any) -> None:
    """Assert that two saved states are the same to the bit."""
    assert ours[1].updates == theirs[1].updates
    for mine, other in ((ours[0], theirs[0]), (ours[1].mean, theirs[1].mean), (ours[1].square, theirs[1].square)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_stages_saved_one_process_takes_up_and_back(ranks: Ranks, precision: str) -> None:
    plain, piped = {"kind": "plain", "precision": precision}, {"precision": precision}
    rows, end = ranks(through, piped, (2, 2), range(4), count=2)[0]
    _, middle = ranks(through, piped, (2, 2), range(2), count=2)[0]
    again, resumed = ranks(through, piped, (2, 2), range(2, 4), middle, count=2)[0]
    assert again == rows[2:]
    alike(resumed, end)
    assert set(middle[1].updates) == set(middle[0]) == {name for name, _ in new_network("mmdit").named_parameters()}
    alike(through(plain, (1, 1), range(2, 2), middle)[1], middle)
    alone, left = through(plain, (1, 1), range(2, 4), middle)
    assert alone == [pytest.approx(row, rel=1e-4 if precision == "fp32" else 2**-4) for row in rows[2:]]
    alike(ranks(through, piped, (2, 2), range(4, 4), left, count=2)[0][1], left)


def spread_out() -> tuple[bool, list[str], list[str], dict[str, Tensor]]:
    network = new_network("mmdit")
    engine = new_engine(network, 2, 4, sharding="zero1")
    train(engine, network, range(2))
    live = engine.masters()
    whole, parts = engine.gather(live), engine.gather(live, spread=True)
    back = engine.scatter(engine.collect(whole)[0])
    same = back.keys() == live.keys() and all(torch.equal(back[name], live[name]) for name in live)
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    engine.close()
    return same, list(whole), list(parts), weights


def test_masters_gather_to_one_rank_or_spread_over_all_stages_and_replicas(ranks: Ranks) -> None:
    found = ranks(spread_out, count=4)
    names = {name for name, _ in new_network("mmdit").named_parameters()}
    assert all(same for same, *_ in found)
    assert [set(whole) for _, whole, *_ in found] == [names, set(), set(), set()]
    parts = [name for _, _, part, _ in found for name in part]
    assert set(parts) == names
    assert len(parts) == len(names)
    # Replicas hold the same, and all ranks the same of what is outside the blocks.
    weights = [weights for *_, weights in found]
    assert weights[0].keys() == weights[2].keys() != weights[1].keys() == weights[3].keys()
    for one in weights[1:]:
        assert all(torch.equal(one[name], weights[0][name]) for name in one.keys() & weights[0].keys())
    assert "img_in.weight" in weights[0].keys() & weights[1].keys()


def spoiled() -> list[Any]:
    """A gradient that is not finite in one stage alone."""
    network = new_network("mmdit")
    engine = new_engine(network, 2, 2)
    train(engine, network, range(1))
    before, rate = everything(engine), engine.learning_rate()
    engine.backward(asked(engine.model, network, 9).square().mean())
    if engine.rank == 1:
        weight = network.single_blocks[1].linear2.weight
        weight.grad[0, 0] = torch.nan
    norm = engine.step()
    after, rates = everything(engine), (rate, engine.learning_rate())
    rows = train(engine, network, range(1, 2))
    engine.close()
    return [norm, before, after, rates, rows]


def test_a_gradient_that_is_not_finite_in_one_stage_updates_nothing_in_any(ranks: Ranks) -> None:
    found = ranks(spoiled, count=2)
    for norm, _, _, (before, after), rows in found:
        assert norm != norm
        assert before != after
        assert all(value == value for row in rows for value in row)
    alike(found[0][1], found[0][2])


def refused(name: str) -> str:
    network: nn.Module = new_network(name) if name in MAKERS else nn.Sequential(nn.Linear(2, 2))
    try:
        new_engine(network, 3, 3)
    except EngineError as error:
        dist.barrier()
        return str(error)
    return ""


def test_a_network_without_enough_blocks_is_refused(ranks: Ranks) -> None:
    said = ranks(refused, "stdit", count=3)
    assert said == ["STDiT has 2 block(s) for 3 pipeline stages: set pipeline_parallel to 2 or less"] * 3
    said = ranks(refused, "layers", count=3)
    assert said == ["Sequential has no blocks to cut into stages: set pipeline_parallel to 1"] * 3


@pytest.mark.slow
def test_a_stage_of_a_recipe_trains_in_a_pipeline_and_goes_on_in_one_process(
    make_recipe: Callable[..., Any], make_call: Callable[..., Call], ranks: Ranks, latents: Path
) -> None:
    """Checkpoints, moving average, held-out loss and export of whole networks, with every block on one rank only."""
    look = {"validation": {"every": 3, "clips": 2, "timesteps": 2}}
    alone = make_recipe(stage=look)
    stage = alone.stage("stage1")
    engine = {**stage.engine.model_dump(), "kind": "colossal", "sharding": "none", "pipeline_parallel": 2}
    piped = make_recipe(stage={**look, "engine": engine, "compute": {**stage.compute.model_dump(), "processes": 2}})
    calls = [
        make_call("stage", recipe, out=out, inputs={"latents": latents}, stage="stage1")
        for out, recipe in (("alone", alone), ("piped", piped), ("piped", alone))
    ]
    train_stage(calls[0])
    ranks(train_stage, calls[1], count=2)
    folder = calls[1].out
    found, wanted = ({**load_file(call.out / "weights.safetensors")} for call in calls[:2])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (folder / "weights.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    train_stage(calls[2])
    torch.testing.assert_close(load_file(folder / "weights.safetensors"), wanted, rtol=1e-4, atol=1e-5)
