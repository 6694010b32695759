"""The MMDiT and its training step as a tutorial would write them: the other side of `benchmarks.train_throughput`.

One nn.Linear a projection, attention by its formula, nn.LayerNorm without weights, AdamW one tensor at a time. Weights
carry the names of `ml.models.mmdit` (split layout), so both sides start alike. Letters as there: B batch, L visual
tokens, S text tokens, W width, N heads, D head size.
"""

import math

import torch
from torch import Tensor, nn

from ml.architectures import MMDiT as Section
from ml.sections import Adam


class Norm(nn.Module):
    """Root-mean-square norm with a scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * self.scale


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Norm(size), Norm(size)


class Embedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,size] -> [B,W]."""
        embedded: Tensor = self.out_layer(nn.functional.silu(self.in_layer(x)))
        return embedded


class Modulation(nn.Module):
    """Vectors that scale, shift and gate."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count, self.lin = count, nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B,W] -> `count` times [B,1,W]."""
        chunks: tuple[Tensor, ...] = self.lin(nn.functional.silu(vec)).unsqueeze(1).chunk(self.count, dim=-1)
        return chunks


class Stream(nn.Module):
    """Projections of text or picture."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        width, self.heads = section.hidden_size, section.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, section.qkv_bias) for _ in range(3))
        self.norm, self.proj = QKNorm(width // self.heads), nn.Linear(width, width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,L,W] -> three times [B,N,L,D]."""
        query, key, value = (split(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.norm.query_norm(query), self.norm.key_norm(key), value


class Double(nn.Module):
    """Text and picture, joined in attention."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        width, hidden = section.hidden_size, int(section.hidden_size * section.mlp_ratio)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = Stream(section), Stream(section)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
            for _ in range(2)
        )

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """img [B,L,W], txt [B,S,W], vec [B,W], angles [S+L,D/2]."""
        ours, theirs = self.img_mod(vec), self.txt_mod(vec)
        iq, ik, iv = self.img_attn.qkv(self.layer_norm(img) * (1 + ours[1]) + ours[0])
        tq, tk, tv = self.txt_attn.qkv(self.layer_norm(txt) * (1 + theirs[1]) + theirs[0])
        query, key, value = torch.cat([tq, iq], 2), torch.cat([tk, ik], 2), torch.cat([tv, iv], 2)
        out = attend(turn(query, angles), turn(key, angles), value)
        img = img + ours[2] * self.img_attn.proj(out[:, txt.shape[1] :])
        txt = txt + theirs[2] * self.txt_attn.proj(out[:, : txt.shape[1]])
        img = img + ours[5] * self.img_mlp(self.layer_norm(img) * (1 + ours[4]) + ours[3])
        txt = txt + theirs[5] * self.txt_mlp(self.layer_norm(txt) * (1 + theirs[4]) + theirs[3])
        return img, txt


class Single(nn.Module):
    """Both in one stream, attention beside the MLP."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        width, hidden = section.hidden_size, int(section.hidden_size * section.mlp_ratio)
        self.width, self.heads = width, section.num_heads
        self.layer_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_mlp, self.linear2 = nn.Linear(width, width + hidden), nn.Linear(width + hidden, width)
        self.norm, self.modulation = QKNorm(width // self.heads), Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor, angles: Tensor) -> Tensor:
        """x [B,S+L,W], vec [B,W], angles [S+L,D/2]."""
        shift, scale, gate = self.modulation(vec)
        normed = self.layer_norm(x) * (1 + scale) + shift
        query = self.norm.query_norm(split(self.q_proj(normed), self.heads))
        key = self.norm.key_norm(split(self.k_proj(normed), self.heads))
        both = self.v_mlp(normed)
        value, hidden = split(both[..., : self.width], self.heads), both[..., self.width :]
        out = attend(turn(query, angles), turn(key, angles), value)
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        new: Tensor = x + gate * self.linear2(torch.cat([out, hidden], -1))
        return new


class Last(nn.Module):
    """Modulated norm and projection."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B,L,W] -> [B,L,size]."""
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.linear(self.layer_norm(x) * (1 + scale) + shift)
        return out


class PlainMMDiT(nn.Module):
    """The network in the split layout with half-split positions, as 2.0's recipe has it."""

    def __init__(self, section: Section) -> None:
        super().__init__()
        self.section, width = section, section.hidden_size
        self.img_in, self.txt_in = nn.Linear(section.in_channels, width), nn.Linear(section.context_in_dim, width)
        self.time_in, self.vector_in = Embedder(256, width), Embedder(section.vec_in_dim, width)
        self.cond_in = nn.Linear(section.in_channels + section.patch_size**2, width)
        self.double_blocks = nn.ModuleList([Double(section) for _ in range(section.depth)])
        self.single_blocks = nn.ModuleList([Single(section) for _ in range(section.depth_single_blocks)])
        self.final_layer = Last(width, section.in_channels)

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Latents [B,C,t,h,w] at t [B], context [B,S,D], pooled [B,P] -> the velocity [B,C,t,h,w]."""
        batch, channels, frames, height, width = latents.shape
        patch = self.section.patch_size
        grid = (frames, height // patch, width // patch)
        cut = latents.reshape(batch, channels, frames, grid[1], patch, grid[2], patch)
        tokens = cut.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, math.prod(grid), -1)
        nothing = torch.zeros(batch, tokens.shape[1], self.cond_in.in_features)
        img, txt = self.img_in(tokens) + self.cond_in(nothing), self.txt_in(context)
        vec = self.time_in(sinusoids(t)) + self.vector_in(pooled)
        angles = self.angles(grid, txt.shape[1])
        for double in self.double_blocks:
            img, txt = double(img, txt, vec, angles)
        joint = torch.cat([txt, img], 1)
        for single in self.single_blocks:
            joint = single(joint, vec, angles)
        out = self.final_layer(joint[:, txt.shape[1] :], vec).reshape(batch, *grid, channels, patch, patch)
        whole: Tensor = out.permute(0, 4, 1, 2, 5, 3, 6).reshape(latents.shape)
        return whole

    def angles(self, grid: tuple[int, int, int], num_text: int) -> Tensor:
        """Rotary angles [S+L,D/2]; text stands at the origin."""
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
        places = torch.cat([torch.zeros(num_text, 3), places.float()])
        parts = []
        for axis, size in enumerate(self.section.axes_dim):
            frequencies = self.section.theta ** -(torch.arange(0, size, 2).float() / size)
            parts.append(places[:, axis, None] * frequencies)
        return torch.cat(parts, -1)


class PlainStep:
    """The training step: noise, forward, loss, backward, clip, AdamW."""

    def __init__(self, network: PlainMMDiT, section: Adam, grad_clip: float) -> None:
        self.network, self.grad_clip = network, grad_clip
        self.optimizer = torch.optim.AdamW(
            network.parameters(), section.lr, section.betas, section.eps, section.weight_decay, foreach=False
        )

    def __call__(self, latents: Tensor, text: tuple[Tensor, Tensor], t: Tensor, noise: Tensor, floor: float) -> float:
        """One update at times t [B]; `floor` is the noise that is left at time 0. The loss."""
        wide = t.reshape(-1, 1, 1, 1, 1)
        noisy = (1 - wide) * latents + (wide + floor * (1 - wide)) * noise
        velocity = self.network(noisy, t, *text)
        loss = nn.functional.mse_loss(velocity, (1 - floor) * noise - latents)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip, foreach=False)
        self.optimizer.step()
        return loss.item()


def sinusoids(t: Tensor) -> Tensor:
    """[B] -> [B,256]."""
    angles = 1000.0 * t[:, None] * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


def split(x: Tensor, heads: int) -> Tensor:
    """[B,L,W] -> [B,N,L,D]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate lane j with lane j + D/2 of [B,N,L,D]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B,N,L,D] -> [B,L,W]."""
    weights = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]), dim=-1)
    return (weights @ value).transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)
