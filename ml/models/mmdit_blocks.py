"""Blocks of the MMDiT: two streams that meet in attention, then one joint stream.

Letters: B batch, L visual tokens, S text tokens, W width, N heads, D head size. Every block exists in two layouts of
the same numbers (`ml.models.mmdit_layouts` converts): fused (`qkv`, `linear1`: Flux) and split (`q_proj`, `k_proj`,
`v_proj` or `v_mlp`: the released 2.0 weights). Text tokens come first wherever both streams are joined.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ml.architectures import MMDiT as MMDiTSection
from ml.models.layers import Modulation, QKNorm, modulate
from ml.models.rope import rotate, rotate_pairs
from ml.models.sequence import Shared


@dataclass(frozen=True)
class Rope:
    """Cosines and sines [B,1,S+L,D/2] of this rank's tokens, and which lanes they turn together."""

    cos: Tensor
    sin: Tensor
    half_split: bool

    def turn(self, x: Tensor) -> Tensor:
        """[B,N,S+L,D] -> the same shape."""
        return (rotate if self.half_split else rotate_pairs)(x, self.cos, self.sin)


class StreamAttention(nn.Module):
    """Projections of one stream (text or picture) of a double block."""

    def __init__(self, config: MMDiTSection) -> None:
        super().__init__()
        width, self.heads, self.fused = config.hidden_size, config.num_heads, config.fused_qkv
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
            self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
            self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.norm = QKNorm(width // self.heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,L,W] -> normed query and key, and value, each [B,N,L,D]."""
        parts = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (heads_first(part, self.heads) for part in parts)
        return (*normed(self.norm, query, key, value), value)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own that meet in attention."""

    def __init__(self, config: MMDiTSection) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = StreamAttention(config), StreamAttention(config)
        self.img_mlp, self.txt_mlp = mlp(width, hidden), mlp(width, hidden)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, shared: Shared) -> tuple[Tensor, Tensor]:
        """img [B,L,W], txt [B,S,W], vec [B,W] -> the same shapes; `shared` says whose tokens they attend to as well."""
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        txt_qkv = self.txt_attn.project(modulate(txt, txt_mod[0], txt_mod[1]))
        img_qkv = self.img_attn.project(modulate(img, img_mod[0], img_mod[1]))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        joint = heads_last(shared.attention(rope.turn(query), rope.turn(key), value))
        txt_out, img_out = torch.split(joint, [txt.shape[1], img.shape[1]], dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_out)
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, img_mod[3], img_mod[4]))
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, txt_mod[3], txt_mod[4]))
        return img, txt


class SingleBlock(nn.Module):
    """One joint stream; attention and MLP run side by side and share their output projection."""

    def __init__(self, config: MMDiTSection) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.width, self.heads, self.fused = width, config.num_heads, config.fused_qkv
        if self.fused:
            self.linear1 = nn.Linear(width, 3 * width + hidden)
        else:
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width)
            self.v_mlp = nn.Linear(width, width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNorm(width // self.heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope, shared: Shared) -> Tensor:
        """Joint tokens [B,S+L,W], vec [B,W] -> [B,S+L,W]."""
        shift, scale, gate = self.modulation(vec)
        query, key, value, hidden = self._project(modulate(x, shift, scale))
        joint = heads_last(shared.attention(rope.turn(query), rope.turn(key), value))
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        out: Tensor = x + gate * self.linear2(torch.cat([joint, hidden], dim=-1))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B,L,W] -> normed query and key, value [B,N,L,D] each, and the hidden lanes of the MLP."""
        if self.fused:
            q, k, v, hidden = _parts(self.linear1(x), [self.width] * 3)
        else:
            q, k = self.q_proj(x), self.k_proj(x)
            v, hidden = _parts(self.v_mlp(x), [self.width])
        query, key, value = (heads_first(part, self.heads) for part in (q, k, v))
        return (*normed(self.norm, query, key, value), value, hidden)


class FinalLayer(nn.Module):
    """Modulated norm and the projection to packed latents."""

    def __init__(self, width: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B,L,W] -> [B,L,out]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


def normed(norm: QKNorm, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Normed query and key in the dtype of the value, which autocast may have made narrower than the norm's scale."""
    query, key = norm(query, key)
    return query.to(value.dtype), key.to(value.dtype)


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B,L,N D] -> [B,N,L,D]."""
    return rearrange(x, "b l (n d) -> b n l d", n=heads)


def heads_last(x: Tensor) -> Tensor:
    """[B,N,L,D] -> [B,L,N D]."""
    return rearrange(x, "b n l d -> b l (n d)")


def _parts(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Lanes of x [...,W] by these sizes, and the rest. (`split` joins gradients at once, `tensor_split` adds zeros.)"""
    parts: tuple[Tensor, ...] = torch.split(x, [*sizes, x.shape[-1] - sum(sizes)], dim=-1)
    return parts
