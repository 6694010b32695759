"""The block of STDiT-3, spatial or temporal, windowed or not (om/stdit/stdit3.py, 1.2 and 1.3).

Letters: B batch, T H W grid of tokens, S = H W or this rank's share of them, D width of the network.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ml import architectures
from ml.models.layers import modulate
from ml.models.sequence import HERE, Shared
from ml.models.stdit_layers import (
    Attention,
    Grid,
    Mlp,
    Moment,
    MultiHeadCrossAttention,
    PackedText,
    Rope,
    drop_path,
    table,
    vectors,
)
from ml.models.windows import WindowAttention


class Heard(NamedTuple):
    """The texts a block attends to: the prompt, and for the frames `given` (1.3) the null text in its place."""

    prompt: PackedText
    given: tuple[int, ...] = ()
    null: PackedText | None = None


class Place(NamedTuple):
    """Where tokens are: their grid (T, H, W) over all ranks, the rotary positions of a spatial and of a temporal block,
    and who holds which tokens of a frame.
    """

    grid: Grid
    spatial: Rope | None
    temporal: Rope
    window_mask: Tensor | None = None
    shared: Shared = HERE


class STDiT3Block(nn.Module):
    """Gated self-attention, cross-attention, gated MLP: within a frame, or `temporal`, over frames or 3-D windows."""

    def __init__(self, config: architectures.STDiT3, temporal: bool, drop_rate: float) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.temporal, self.drop_rate = temporal, drop_rate
        self.attn: Attention | WindowAttention
        if temporal and config.kernel_size is not None:
            self.attn = WindowAttention(width, heads, config.kernel_size, config.qk_norm)
        else:
            self.attn = Attention(width, heads, config.qk_norm, rope_first=config.qk_norm_legacy)
        self.cross_attn = MultiHeadCrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.scale_shift_table = table(6, width)

    def forward(self, x: Tensor, moment: Moment, heard: Heard, place: Place) -> Tensor:
        """[B,T,S,D] -> [B,T,S,D]; `moment` holds six vectors of width D."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors(self.scale_shift_table, moment)
        attended = gate * self._attend(modulate(x, shift, scale), place)
        x = x + drop_path(attended, self.drop_rate, self.training)
        x = x + self._listen(x, heard)
        thought = mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))
        return x + drop_path(thought, self.drop_rate, self.training)

    def _attend(self, x: Tensor, place: Place) -> Tensor:
        attended: Tensor
        if isinstance(self.attn, WindowAttention):
            attended = self.attn(x, place.grid, place.temporal, place.window_mask, place.shared)
            return attended
        if self.temporal:
            attended = self.attn(x.transpose(1, 2).flatten(0, 1), place.temporal)
            return attended.reshape(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2)
        attended = self.attn(x.flatten(0, 1), place.spatial, place.shared)
        return attended.reshape(x.shape)

    def _listen(self, x: Tensor, heard: Heard) -> Tensor:
        """Cross-attention; given frames attend to the null text, so the prompt says nothing of them."""
        if not heard.given or heard.null is None:
            out: Tensor = self.cross_attn(x, heard.prompt)
            return out
        given = list(heard.given)
        rest = [index for index in range(x.shape[1]) if index not in heard.given]
        parts = [self.cross_attn(x[:, given], heard.null)]
        parts += [self.cross_attn(x[:, rest], heard.prompt)] if rest else []
        order = torch.tensor([*given, *rest], device=x.device).argsort()
        return torch.cat(parts, dim=1)[:, order]
