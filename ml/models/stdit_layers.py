"""Parts that STDiT, STDiT-2 and STDiT-3 share, under the names of the released weights (om/layers/blocks.py, 1.0-1.3).

Letters: B batch, C channels, T H W the grid of tokens, S = H W tokens per frame, D width of the network, N heads, L
text tokens, K vectors of a table. Tokens travel as [B,T,S,D], so vectors that differ between frames are [B,T,1,D] and
those that do not are [B,1,1,D].
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ml.models.attention import packed_attention
from ml.models.layers import NORM_EPS, modulate, timestep_embedding
from ml.models.rope import rotate_pairs
from ml.models.sequence import HERE, Shared

TIME_FEATURES = 256
Rope = tuple[Tensor, Tensor]
Grid = tuple[int, int, int]


class MarkedFramesError(ValueError):
    """Latent frames marked one by one for a network whose tokens hold several."""


class PackedText(NamedTuple):
    """Real text tokens of all samples in one row [sum of lengths, D], and how many belong to each sample."""

    tokens: Tensor
    lengths: list[int]


class Moment(NamedTuple):
    """What modulates a block: `now` [B,K D]; where frames are given, `clean` [B,K D] of time 0, and `active` [B,T]."""

    now: Tensor
    clean: Tensor | None = None
    active: Tensor | None = None


class PatchEmbed3D(nn.Module):
    """A convolution that turns every patch of the latent into a token."""

    def __init__(self, patch_size: Grid, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,t,h,w] -> [B,T,S,D]; each axis is padded with zeros at its end to a multiple of the patch."""
        tokens: Tensor = self.proj(pad_to_patches(x, self.patch_size))
        return rearrange(tokens, "b d t h w -> b t (h w) d")


class TimestepEmbedder(nn.Module):
    """Sinusoids of a number (cosines first), then Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """[B], in the unit of the network (0 to 1000) -> [B,D]."""
        features = timestep_embedding(t, TIME_FEATURES, factor=1.0).to(next(self.mlp.parameters()).dtype)
        embedded: Tensor = self.mlp(features)
        return embedded


class SizeEmbedder(TimestepEmbedder):
    """The same net for sizes: every number is embedded alone and the rows are joined."""

    def forward(self, t: Tensor) -> Tensor:
        """[B] or [B,n] -> [B, n D]."""
        numbers = t.reshape(t.shape[0], -1)
        return super().forward(numbers.flatten()).reshape(t.shape[0], -1)


class Mlp(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, in_size: int, hidden: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_size, hidden)
        self.fc2 = nn.Linear(hidden, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """[...,in] -> [...,out]."""
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedder(nn.Module):
    """Text to the width of the network; holds the null caption `y_embedding` that stands for no text.

    The house drops captions in its trainer, with the trainer's generator, so training mode drops nothing here unless
    `random_drop` is set: then a caption gives way to the null caption with probability `class_dropout_prob`, drawn from
    torch's global generator as the original does.
    """

    y_embedding: Tensor

    def __init__(self, in_channels: int, width: int, num_tokens: int, class_dropout_prob: float = 0.0) -> None:
        super().__init__()
        self.class_dropout_prob, self.random_drop = class_dropout_prob, False
        self.y_proj = Mlp(in_channels, width, width)
        self.register_buffer("y_embedding", torch.randn(num_tokens, in_channels) / in_channels**0.5)

    def forward(self, caption: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """[B,1,L,caption channels] -> [B,1,L,D]; `force_drop_ids` [B] is 1 where the null caption takes over."""
        if force_drop_ids is None and self.training and self.random_drop and self.class_dropout_prob > 0:
            force_drop_ids = torch.rand(caption.shape[0], device=caption.device) < self.class_dropout_prob
        if force_drop_ids is not None:
            dropped = (force_drop_ids == 1)[:, None, None, None]
            caption = torch.where(dropped, self.y_embedding.to(caption.dtype), caption)
        embedded: Tensor = self.y_proj(caption)
        return embedded


class WeightedRMSNorm(nn.Module):
    """Root-mean-square norm of queries or keys, computed in at least float32; the learned scale is named `weight`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., head size] -> the same shape."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * normed.to(x.dtype)


class RotaryTime(nn.Module):
    """Rotary positions in the layout of rotary-embedding-torch: lanes 2i and 2i+1 turn by position x theta^(-2i/size).

    `freqs` [size/2] is kept with the weights as released (`rope.freqs`) though nothing ever trains it.
    """

    freqs: Tensor

    def __init__(self, size: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 1 / theta ** (torch.arange(0, size, 2).float() / size))

    def forward(self, positions: Tensor) -> Rope:
        """Positions [L] -> cosines and sines [L,size/2], in at least float32; for `rotate_pairs`."""
        freqs = self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))
        angles = positions.to(freqs)[:, None] * freqs
        return angles.cos(), angles.sin()


class Projections(nn.Module):
    """The weights of self-attention with the optional q/k norm; how tokens attend is up to who uses them."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm: nn.Module = WeightedRMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = WeightedRMSNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)


class Attention(Projections):
    """Self-attention over the last axis of tokens, with the optional q/k norm and rotary positions.

    `rope_first` turns queries and keys before their norm, as 1.1 was trained (`qk_norm_legacy`); 1.2 and 1.3 turn them
    after it. The two differ because the norm has a scale per lane.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, rope_first: bool = False) -> None:
        super().__init__(width, heads, qk_norm)
        self.rope_first = rope_first

    def forward(self, x: Tensor, rope: Rope | None = None, shared: Shared = HERE) -> Tensor:
        """[B,L,D] -> [B,L,D]; `rope` [L,head size/2] twice; `shared` says whose tokens are attended to as well."""
        query, key, value = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.heads)
        if rope is not None and self.rope_first:
            query, key = rotate_pairs(query, *rope), rotate_pairs(key, *rope)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None and not self.rope_first:
            query, key = rotate_pairs(query, *rope), rotate_pairs(key, *rope)
        # Autocast leaves the norm's output wider than the value.
        heard = shared.attention(query.to(value.dtype), key.to(value.dtype), value)
        joined: Tensor = self.proj(rearrange(heard, "b n l d -> b l (n d)"))
        return joined


class MultiHeadCrossAttention(nn.Module):
    """Attention of video tokens over the packed text: a sample sees its own real text tokens and nothing else."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: PackedText) -> Tensor:
        """[B,...,D] -> the same shape."""
        query = rearrange(self.q_linear(x).flatten(0, -2), "l (n d) -> l n d", n=self.heads)
        key, value = rearrange(self.kv_linear(text.tokens), "l (two n d) -> two l n d", two=2, n=self.heads)
        lengths = [len(query) // len(x)] * len(x)
        heard = packed_attention(query, key, value, lengths, text.lengths)
        joined: Tensor = self.proj(heard.reshape(*x.shape[:-1], -1))
        return joined


class T2IFinalLayer(nn.Module):
    """Modulated norm and the projection to patches; modulated by the plain time embedding, not by `t_block`."""

    def __init__(self, width: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_volume * out_channels)
        self.scale_shift_table = table(2, width)

    def forward(self, x: Tensor, t: Tensor, active: Tensor | None = None, t0: Tensor | None = None) -> Tensor:
        """[B,T,S,D] with t [B,D] -> [B,T,S,patch volume x out channels].

        Where frames are given, `active` [B,T] and t0 [B,D] go together. The released networks then norm and modulate a
        given frame twice, by t and again by t0 (om/layers/blocks.py, 1.1 to 1.3), and so does this layer.
        """
        x = modulate(x, *vectors(self.scale_shift_table, Moment(t.repeat(1, 2))))
        if active is not None and t0 is not None:
            again = modulate(x, *vectors(self.scale_shift_table, Moment(t0.repeat(1, 2))))
            x = torch.where(active[:, :, None, None], x, again)
        out: Tensor = self.linear(x)
        return out


class PositionEmbedding2D(nn.Module):
    """Sinusoidal positions of a frame's tokens for any size (1.1 to 1.3); nothing is learned or stored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, like: Tensor, height: int, width: int, scale: float, base_size: int) -> Tensor:
        """Positions [1,S,D] on the device and in the dtype of `like`, row by row.

        A coordinate is index / scale x base_size / tokens along the axis: `scale` is the square root of the clip's
        pixels over the network's `input_sq_size`, `base_size` the rounded square root of S.
        """
        rows = torch.arange(height, device=like.device) / scale * (base_size / height)
        columns = torch.arange(width, device=like.device) / scale * (base_size / width)
        return plane(rows, columns, self.width)[None].to(like.dtype)


def sincos(positions: Tensor, size: int) -> Tensor:
    """Sines, then cosines, of positions [L] at frequencies 10000^(-2i/size): [L,size], in the dtype of positions."""
    steps = torch.arange(0, size, 2, device=positions.device).to(positions.dtype)
    angles = positions[:, None] / 10_000.0 ** (steps / size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def plane(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Positions of a grid of rows [H] and columns [W]: [H W,size]; the column takes the first half of the lanes."""
    across = sincos(columns, size // 2).expand(len(rows), -1, -1)
    down = sincos(rows, size // 2)[:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def table(count: int, width: int) -> nn.Parameter:
    """A learned table of modulation vectors [count,D], drawn from N(0, 1/D)."""
    return nn.Parameter(torch.randn(count, width) / width**0.5)


def vectors(scale_shift_table: Tensor, moment: Moment) -> tuple[Tensor, ...]:
    """The vectors of a table [K,D] at a moment: K tensors [B,1,1,D], or [B,T,1,D] where frames are given.

    Choosing per frame here equals choosing between two modulated copies of the tokens, as the original does.
    """
    chosen = _shifted(scale_shift_table, moment.now)
    if moment.active is not None and moment.clean is not None:
        chosen = torch.where(moment.active[:, :, None, None], chosen, _shifted(scale_shift_table, moment.clean))
    return tuple(chosen[:, :, index, None] for index in range(len(scale_shift_table)))


def pack_text(caption: Tensor, mask: Tensor | None) -> PackedText:
    """Drop padding: caption [B,1,L,D] and mask [B,L] (None = all real) -> real tokens in one row.

    A mask of fewer rows than the captions is repeated, as the original does for guidance.
    """
    caption = caption.squeeze(1)
    if mask is None:
        return PackedText(caption.flatten(0, 1), [caption.shape[1]] * caption.shape[0])
    real = mask.reshape(mask.shape[0], -1).repeat(caption.shape[0] // mask.shape[0], 1) != 0
    return PackedText(caption[real], real.sum(dim=1).tolist())


def pad_to_patches(x: Tensor, patch_size: Grid) -> Tensor:
    """[B,C,t,h,w] with each of the last three axes padded with zeros at its end to a multiple of the patch."""
    ends = [-size % patch for size, patch in zip(x.shape[2:], patch_size, strict=True)]
    return nn.functional.pad(x, (0, ends[2], 0, ends[1], 0, ends[0])) if any(ends) else x


def token_grid(shape: torch.Size, patch_size: Grid) -> Grid:
    """Tokens along each axis of a latent [B,C,t,h,w]."""
    frames, height, width = (-(-size // patch) for size, patch in zip(shape[2:], patch_size, strict=True))
    return frames, height, width


def check_marked(patch_size: Grid, marked: object) -> None:
    """Raise MarkedFramesError when latent frames are `marked` (neither None nor empty) and a token holds several.

    A forward's own masks count frames of tokens, as the originals' do; the house marks frames of the latent.
    """
    if patch_size[0] > 1 and marked is not None and marked != ():
        raise MarkedFramesError(
            f"patch_size {patch_size} joins {patch_size[0]} latent frames in a token, so single ones cannot be given; "
            "use a patch of one frame, or give none"
        )


def unpatchify(tokens: Tensor, shape: torch.Size, patch_size: Grid, out_channels: int) -> Tensor:
    """Tokens [B,T,S,patch volume x out channels] (channel fastest) -> [B,out channels,t,h,w] of a latent's shape."""
    _, height, width = token_grid(shape, patch_size)
    sizes = {"h": height, "w": width, "pt": patch_size[0], "ph": patch_size[1], "pw": patch_size[2], "c": out_channels}
    x = rearrange(tokens, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", **sizes)
    return x[:, :, : shape[2], : shape[3], : shape[4]]


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, leave a sample's residual [B,...] out with probability `rate`; the others grow to keep the mean."""
    if rate == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


def initialise(network: nn.Module, gaussian: Iterable[nn.Module], silent: Iterable[nn.Module]) -> None:
    """Xavier-uniform weights and zero biases; the linear layers within `gaussian` draw from N(0, 0.02^2) instead and
    those within `silent` start at zero.

    The patch convolution counts as a linear layer for its weight and keeps torch's bias (om/stdit/*.py, 1.0 to 1.3).
    """
    for module in network.modules():
        if isinstance(module, PatchEmbed3D):
            nn.init.xavier_uniform_(module.proj.weight.detach().flatten(1))
    for layer in _linear([network]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in _linear(gaussian):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in _linear(silent):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def freeze_parameters(network: nn.Module, freeze: str | None) -> None:
    """Stop training all but temporal attention (`not_temporal`), or cross-attention (`text`); None stops nothing."""
    for name, parameter in network.named_parameters():
        if (freeze == "not_temporal" and "attn_temp" not in name) or (freeze == "text" and "cross_attn" in name):
            parameter.requires_grad_(False)


def _linear(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]


def _shifted(scale_shift_table: Tensor, t: Tensor) -> Tensor:
    """Table [K,D] plus t [B,K D]: [B,1,K,D]."""
    return (scale_shift_table + t.reshape(-1, *scale_shift_table.shape))[:, None]
