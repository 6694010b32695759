"""STDiT's factorised attention against full space-time attention, in the sizes of Open-Sora 1.0's throughput table.

`python -m benchmarks.factorised_attention [--tiny]` times forward and training steps of two networks that differ in
their blocks only: STDiT's spatial and temporal attention, or one attention over all tokens. On a GPU at full width
(bfloat16); on a CPU by similarity: width and tokens of a frame divided by 8, which keeps the share of attention in full
attention's FLOPs. Depth is 2 of 28 blocks, as every block costs the same. Published ratios are of training samples per
second on 8 H800, autoencoder and text encoder included (docs/acceleration.md, 1.0).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import Pair, arguments, console, device, table, time_both, times
from ml import architectures
from ml.counts import block_flops
from ml.models.inputs import Inputs, Text, denoise
from ml.models.layers import modulate
from ml.models.sequence import Shared
from ml.models.stdit import STDiT, STDiTBlock
from ml.models.stdit_layers import Moment, PackedText, vectors

SHRINK, DEPTH, TEXT_TOKENS = 8, 2, 120


@dataclass(frozen=True)
class Size:
    """A row of the published table: frames, pixels of a side, and how many times faster STDiT trained."""

    frames: int
    side_px: int
    published: float

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent grid (t, h, w) of Stable Diffusion's autoencoder."""
        return self.frames, self.side_px // 8, self.side_px // 8


SIZES = (Size(64, 512, 5.0), Size(16, 512, 1.71), Size(16, 256, 0.97))


class FullBlock(STDiTBlock):
    """One attention over all tokens in the place of two; the rest of the block is STDiT's."""

    def __init__(self, config: architectures.STDiT) -> None:
        super().__init__(config, 0.0)
        del self.attn_temp

    def forward(self, x: Tensor, moment: Moment, text: PackedText, shared: Shared, temporal: Tensor | None) -> Tensor:
        """[B,T,S,D] -> the same shape; positions of frames are added to the first block's input."""
        if temporal is not None:
            x = x + temporal[:, :, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors(self.scale_shift_table, moment)
        heard: Tensor = self.attn(modulate(x, shift, scale).flatten(1, 2))
        x = x + gate * heard.reshape(x.shape)
        x = x + self.cross_attn(x, text)
        mixed: Tensor = x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))
        return mixed


@dataclass(frozen=True)
class Similar:
    """A published size at a width and a grid that the machine can time."""

    size: Size
    shrink: int

    @property
    def config(self) -> architectures.STDiT:
        """STDiT of heads of 72 at a share of the width."""
        width = 1152 // self.shrink
        sizes = {"hidden_size": width, "num_heads": width // 72, "depth": DEPTH, "input_size": self.grid}
        return architectures.STDiT.model_validate({**sizes, "caption_channels": 4096 // self.shrink})

    @property
    def grid(self) -> tuple[int, int, int]:
        """The latent grid, with so many times fewer tokens in a frame."""
        frames, height, width = self.size.grid
        tokens = height // 2 * width // 2 // self.shrink
        rows = 2 ** (int(math.log2(tokens)) // 2)
        return frames, 2 * rows, 2 * tokens // rows

    @property
    def text_tokens(self) -> int:
        """Text tokens, fewer likewise."""
        return TEXT_TOKENS // self.shrink


def full_flops(config: architectures.STDiT, grid: tuple[int, int, int], text_tokens: int) -> int:
    """FLOPs of full attention's blocks: depth (28 h^2 N + 4 h N (N + L) + 4 h^2 L)."""
    width, tokens = config.hidden_size, grid[0] * grid[1] * grid[2] // 4
    attended = 4 * width * tokens * (tokens + text_tokens) + 4 * width**2 * text_tokens
    return config.depth * (28 * width**2 * tokens + attended)


def flop_ratio(case: Similar) -> float:
    """FLOPs of full attention over those of STDiT."""
    given = (case.config, case.grid, case.text_tokens)
    return full_flops(*given) / block_flops(*given)


def measure(case: Similar, train: bool, repeats: int) -> Pair:
    """Seconds of full attention (first) and of STDiT (second)."""
    full, factorised = (_network(case, blocks) for blocks in (True, False))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, *case.grid, generator=generator).to(device())
    context = torch.randn(1, case.text_tokens, case.config.caption_channels, generator=generator)
    text = Text(context, torch.zeros(1, 1), torch.ones(1, case.text_tokens, dtype=torch.bool)).to(device(), x.dtype)
    inputs = Inputs(text, case.size.side_px, case.size.side_px, case.size.frames, torch.full((1,), 8.0))

    def run(network: STDiT) -> None:
        kind = device().type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"), torch.set_grad_enabled(train):
            out = denoise(network, network, x, torch.full((1,), 500.0, device=x.device), inputs)
        if train:
            network.zero_grad(set_to_none=True)
            torch.autograd.backward(out.square().mean())

    return time_both(lambda: run(full), lambda: run(factorised), repeats)


def main() -> None:
    """Print seconds of both sides, their ratio, the ratio of FLOPs, and what was published."""
    asked = arguments(__doc__ or "")
    shrink = 16 if asked.tiny else 1 if device().type == "cuda" else SHRINK
    rows = []
    for size in SIZES[1:] if asked.tiny else SIZES:
        case, real = Similar(size, shrink), Similar(size, 1)
        pairs = [measure(case, train, asked.repeats) for train in (False, True)]
        timed = [f"{seconds:.3f}" for pair in pairs for seconds in pair.seconds]
        cells = [*timed[:2], times(pairs[0].ratio), *timed[2:], times(pairs[1].ratio)]
        counted = [times(flop_ratio(case)), times(flop_ratio(real)), times(size.published)]
        rows.append([f"{size.frames}x{size.side_px}x{size.side_px}", *cells, *counted])
    heads = ["size", "s, full", "s, STDiT", "forward", "s, full", "s, STDiT", "training"]
    heads += ["FLOPs", "at full size", "published"]
    shown = [f"{size.frames}x{size.side_px}: {math.prod(Similar(size, shrink).grid) // 4:,}" for size in SIZES]
    note = (
        f"width {1152 // shrink}, tokens {', '.join(shown)}; {DEPTH} blocks, batch 1, seed 0, {asked.repeats} repeats"
    )
    console.print(table("Factorised against full attention: how many times faster", heads, rows, note))


def _network(case: Similar, full: bool) -> STDiT:
    torch.manual_seed(0)
    network = STDiT(case.config)
    if full:
        network.blocks = torch.nn.ModuleList(FullBlock(case.config) for _ in range(case.config.depth))
    return network.to(device())


if __name__ == "__main__":
    main()
