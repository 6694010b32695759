"""The transformer of 2.0 on Video DC-AE's latents against HunyuanVideo's: a 768px clip as 18,432 tokens or 76,032.

`python -m benchmarks.high_compression [--tiny]` times forward and training steps of the same MMDiT on both latents, the
text tokens included, encoding left out (cached latents). On a GPU at full width (bfloat16); on a CPU by similarity:
width and tokens divided by the same number, which keeps the share of attention in the FLOPs. 2 double and 4 single
blocks stand for 19 and 38, as all cost the same. Published: 5.2 times the training throughput, with encoding in the
step, which costs DC-AE as much as the transformer, and 10 times faster sampling (docs/hcae.md, main).
"""

import math
from dataclasses import dataclass

import torch

from benchmarks.common import Pair, arguments, console, device, table, time_both, times
from ml import architectures
from ml.counts import forward_flops, token_grid
from ml.models.inputs import Inputs, Text, denoise
from ml.models.mmdit import MMDiT

Grid = tuple[int, int, int]
WIDTH, TEXT_TOKENS, CPU_SHRINK, GOAL = 3072, 512, 16, 9.0
# Latents of 576 x 1024 pixels: 129 frames at 4x8x8 with 16 channels, 128 at 4x32x32 with 128.
HUNYUAN, DC_AE = (33, 72, 128), (32, 18, 32)
PUBLISHED = {"forward": "10x", "training": "5.2x"}


@dataclass(frozen=True)
class Side:
    """One autoencoder's latents, seen by the network: grid (t, h, w), channels, patch."""

    grid: Grid
    channels: int
    patch: int

    def smaller(self, shrink: int, frames: int) -> "Side":
        """So many times fewer tokens in a frame, rows first as far as they divide, and a part of the frames."""
        latents, height, width = self.grid
        rows = math.gcd(height // self.patch, shrink)
        return Side((latents // frames, height // rows, width // (shrink // rows)), self.channels, self.patch)


SIDES = (Side(HUNYUAN, 16, 2), Side(DC_AE, 128, 1))


def config(side: Side, shrink: int, depth: tuple[int, int] = (2, 4)) -> architectures.MMDiT:
    """The network of 2.0 at a share of its width, with heads of 96 where 128 do not divide it."""
    width = WIDTH // shrink
    head = 128 if width % 128 == 0 else 96
    axes = (head // 8, head * 7 // 16, head * 7 // 16)
    sizes = {"hidden_size": width, "num_heads": width // head, "axes_dim": axes, "patch_size": side.patch}
    blocks = {"depth": depth[0], "depth_single_blocks": depth[1]}
    released = {"cond_embed": True, "fused_qkv": False, "use_liger_rope": True}
    given = {"in_channels": side.channels * side.patch**2, "context_in_dim": 4096 // shrink}
    return architectures.MMDiT.model_validate({**sizes, **blocks, **released, **given})


def flop_ratio(sides: tuple[Side, Side], shrink: int, depth: tuple[int, int] = (2, 4)) -> float:
    """FLOPs of a forward pass of the first side over those of the second."""
    counts = [forward_flops(config(side, shrink, depth), side.grid, TEXT_TOKENS // shrink) for side in sides]
    return counts[0] / counts[1]


def measure(sides: tuple[Side, Side], shrink: int, train: bool, repeats: int) -> Pair:
    """Seconds of a pass over the first side's latents and over the second's, drawn with one seed."""
    first, second = (Pass(side, shrink, train) for side in sides)
    return time_both(first, second, repeats)


def main() -> None:
    """Print seconds of both sides, their ratio, the ratio of FLOPs, and what was published."""
    asked = arguments(__doc__ or "")
    shrink = 32 if asked.tiny else 1 if device().type == "cuda" else CPU_SHRINK
    first, second = (side.smaller(shrink, 8 if asked.tiny else 1) for side in SIDES)
    rows = []
    for name in PUBLISHED:
        pair = measure((first, second), shrink, name == "training", asked.repeats)
        counted = [times(flop_ratio((first, second), shrink)), times(flop_ratio(SIDES, 1, (19, 38)))]
        met = "yes" if pair.ratio >= GOAL else "no"
        seconds = [f"{value:.3f}" for value in pair.seconds]
        rows.append([name, *seconds, times(pair.ratio), *counted, PUBLISHED[name], met])
    heads = ["pass", "s, 4x8x8", "s, DC-AE", "faster", "FLOPs", "at full size", "published", f">= {GOAL:.0f}x"]
    tokens = [num_tokens(side, shrink) for side in (first, second)]
    note = f"width {WIDTH // shrink}, {tokens[0]:,} and {tokens[1]:,} tokens with {TEXT_TOKENS // shrink} of text; "
    note += f"2 + 4 blocks, batch 1, seed 0, medians of {asked.repeats}; cached latents"
    console.print(table("A 768px clip of 128 frames: latents of DC-AE against 4x8x8", heads, rows, note))


def num_tokens(side: Side, shrink: int) -> int:
    """Tokens of a sample, visual and text."""
    frames, height, width = token_grid(config(side, shrink), side.grid)
    return frames * height * width + TEXT_TOKENS // shrink


class Pass:
    """One pass over one side's latents, ready to be timed."""

    def __init__(self, side: Side, shrink: int, train: bool) -> None:
        torch.manual_seed(0)
        section, self.train = config(side, shrink), train
        self.network = MMDiT(section).to(device())
        generator = torch.Generator().manual_seed(0)
        num_text = TEXT_TOKENS // shrink
        context = torch.randn(1, num_text, section.context_in_dim, generator=generator)
        text = Text(context, torch.randn(1, section.vec_in_dim, generator=generator), torch.ones(1, num_text))
        self.inputs = Inputs(text.to(device(), torch.float32), 576, 1024, 129, torch.full((1,), 24.0))
        self.x = torch.randn(1, side.channels, *side.grid, generator=generator).to(device())

    def __call__(self) -> None:
        """Forward, and backward where training is timed."""
        kind, t = device().type, torch.full((1,), 0.5, device=self.x.device)
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"), torch.set_grad_enabled(self.train):
            out = denoise(self.network, self.network, self.x, t, self.inputs)
        if self.train:
            self.network.zero_grad(set_to_none=True)
            torch.autograd.backward(out.square().mean())


if __name__ == "__main__":
    main()
