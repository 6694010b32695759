"""`curves(network, section, count)`: the steps of a small network in one process or several, for engines to agree.

A step takes four batches from one numbered stream, whatever the ranks: `accumulate` x data ranks is 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ml.engines.make import make_engine
from ml.engines.protocol import Engine
from ml.methods import Engine as EngineSection
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT
from ml.models.stdit3 import STDiT3
from ml.sections import Adam, Compute
from ml.training.optim import adamw, schedule

# Twenty steps are what engines are accepted by; a few tell whether two ways of cutting go together.
STEPS, FEW, BATCHES = 20, 5, 4
# Gradients that are zero but for rounding (those of a key's bias) must not become updates: hence the large epsilon.
ADAM = Adam(lr=2e-3, eps=1e-6, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=5)
CLIP = 0.5
SECTION = {"kind": "plain", "precision": "fp32", "grad_clip": CLIP, "sequence_parallel": 1, "checkpoint_blocks": (1, 1)}
# Latents [2,4,4,4,8] are 32 tokens on a grid of 4 x 2 x 4.
SHAPE, TEXT, CONTEXT, POOLED = (2, 4, 4, 4, 8), 8, 16, 12

Curves = Callable[..., "Curve"]
Ranks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Curve:
    """Mean loss and gradient norm of every step, and the full masters at the end."""

    losses: list[float]
    norms: list[float]
    masters: dict[str, Tensor]

    def agrees(self, other: "Curve", rel: float = 1e-4) -> None:
        """Assert that another run did the same, to a relative error; the masters in relation to their largest."""
        assert len(self.losses) == len(other.losses) > 0
        assert self.losses == pytest.approx(other.losses, rel=rel)
        assert self.norms == pytest.approx(other.norms, rel=rel)
        assert {n: t.shape for n, t in self.masters.items()} == {n: t.shape for n, t in other.masters.items()}
        for name, master in self.masters.items():
            torch.testing.assert_close(master, other.masters[name], rtol=rel, atol=rel * float(master.abs().max()))


def small_network(name: str) -> nn.Module:
    """A small `mmdit` or `stdit3` whose every weight says something (fresh ones are silent); the same in any process.

    Four heads and even token counts, so that two ranks can share them.
    """
    torch.manual_seed(1)
    network: nn.Module
    if name == "mmdit":
        network = MMDiT(
            in_channels=16,
            vec_in_dim=POOLED,
            context_in_dim=CONTEXT,
            hidden_size=64,
            num_heads=4,
            depth=2,
            depth_single_blocks=2,
            axes_dim=(4, 6, 6),
            fused_qkv=False,
        )
    else:
        network = STDiT3(
            hidden_size=64,
            depth=2,
            num_heads=4,
            caption_channels=CONTEXT,
            model_max_length=TEXT,
            class_dropout_prob=0.0,
            drop_path=0.0,
        )
    network.checkpoint_blocks = SECTION["checkpoint_blocks"]  # type: ignore[assignment]
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    return network


def section_of(**over: Any) -> EngineSection:
    """The section of an engine: plain, fp32, unless told otherwise; `accumulate` makes a step of four batches."""
    return EngineSection.model_validate({**SECTION, "accumulate": BATCHES, **over})


def train_curve(name: str, over: dict[str, Any], count: int, steps: int = STEPS) -> Curve:
    """What `curves` runs in every rank."""
    engine = make_engine(section_of(**over), Compute(accelerators="CPU:1", nodes=1, price="x", processes=count))
    network = small_network(name)
    engine.setup(network, adamw(ADAM), schedule(ADAM, STEPS))
    losses, norms = [], []
    for step in range(steps):
        loss = sum(micro_batches(engine, network, name, step))
        losses.append(engine.total([loss])[0] / BATCHES / (engine.size // engine.data_size))
        norms.append(engine.step())
    masters = engine.gather(engine.masters())
    engine.close()
    return Curve(losses, norms, masters)


def micro_batches(engine: Engine, network: Any, name: str, step: int) -> list[float]:
    """Forward and backward of this rank's batches of a step; their losses."""
    mine = range(step * BATCHES + engine.data_rank, (step + 1) * BATCHES, engine.data_size)
    losses = []
    for number in mine:
        with engine.accumulate(last=number == mine[-1]):
            loss = noise_loss(engine, network, name, number)
            engine.backward(loss / len(mine))
        losses.append(float(loss.detach()))
    return losses


def noise_loss(engine: Engine, network: Any, name: str, number: int) -> Tensor:
    """The flow-matching loss of batch `number` of the stream."""
    generator = torch.Generator().manual_seed(number)
    latents, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    times = torch.rand(SHAPE[0], generator=generator)
    text = Text(
        torch.randn(SHAPE[0], TEXT, CONTEXT, generator=generator),
        torch.randn(SHAPE[0], POOLED, generator=generator),
        torch.arange(TEXT)[None] < torch.tensor([[TEXT], [3]]),
    ).to("cpu", engine.dtype)
    share = times[:, None, None, None, None]
    noisy = ((1 - share) * latents + share * noise).to(engine.dtype)
    inputs = Inputs(text, height=32, width=64, frames=4, fps=torch.full((SHAPE[0],), 24.0))
    unit = 1.0 if name == "mmdit" else 1000.0
    output = denoise(engine.model, network, noisy, times * unit, inputs).float()
    return (output[:, : SHAPE[1]] - (noise - latents)).square().mean()


@pytest.fixture(scope="session")
def curves(ranks: Ranks) -> Curves:
    """Call `curves("mmdit" or "stdit3", {section keys}, count=1, few=False)`: the Curve of 20 or 5 steps in rank 0.

    `accumulate` must be 4 / data ranks: 4 where the ranks share one batch (sequence or tensor parallel), 2 for two data
    ranks. One process runs here; several as gloo ranks.
    """
    alone: dict[str, Curve] = {}

    def run(name: str, over: dict[str, Any], count: int = 1, few: bool = False) -> Curve:
        steps = FEW if few else STEPS
        if count > 1:
            found: Curve = ranks(train_curve, name, over, count, steps, count=count, timeout=280.0)[0]
            assert len(found.losses) == steps
            return found
        key = f"{name} {steps} {sorted(over.items())}"
        if key not in alone:
            threads = torch.get_num_threads()
            try:
                alone[key] = train_curve(name, over, 1, steps)
            finally:
                torch.set_num_threads(threads)
        return alone[key]

    return run
