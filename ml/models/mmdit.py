"""The multi-modal diffusion transformer of Open-Sora 2.0: a velocity for every latent, given time, text and condition.

Letters: B batch, C latent channels, t h w latent grid, p patch, L visual tokens, S text tokens, W width, N heads, D
head size, P pooled text size. Parameters carry the names of the released weights (`Open_Sora_v2.safetensors`, unfused
layout), so those load strictly. Text tokens come first wherever both streams are joined.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ml import sections
from ml.models.attention import attention
from ml.models.layers import (
    MLPEmbedder,
    Modulation,
    QKNorm,
    modulate,
    rope_angles,
    rotate,
    timestep_embedding,
)
from ml.models.weights import Card, Origin, check_card, load_state, read_card, save_weights

TIME_FEATURES = 256


class SequenceParallel(Protocol):
    """The seam where a parallel engine cuts the token axis over its ranks; one forward serves all engines."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of the token axis `dim`."""
        ...

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' shares of the token axis `dim`, joined."""
        ...

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's queries over the keys of all ranks, [B,N,L,D]."""
        ...


class PlainSequence:
    """The default: one rank holds every token."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """All of it."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Nothing to join."""
        return x

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention on this device."""
        return attention(query, key, value)


Rope = tuple[Tensor, Tensor]


class MMDiT(nn.Module):
    """The network; `checkpoint_blocks` = how many double and single blocks recompute their activations in backward."""

    def __init__(self, model: sections.MMDiT, text: sections.Text, latent_channels: int) -> None:
        super().__init__()
        self.section, self.latent_channels = model, latent_channels
        self.checkpoint_blocks = (0, 0)
        self.sp: SequenceParallel = PlainSequence()
        width, cell = model.width, model.patch**2
        self.img_in = nn.Linear(latent_channels * cell, width)
        self.time_in = MLPEmbedder(TIME_FEATURES, width)
        self.vector_in = MLPEmbedder(text.pooled_dim, width)
        self.guidance_in = MLPEmbedder(TIME_FEATURES, width) if model.guidance_embed else None
        self.cond_in = nn.Linear((latent_channels + 1) * cell, width) if model.condition_embed else None
        self.txt_in = nn.Linear(text.context_dim, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(model) for _ in range(model.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(model) for _ in range(model.single_blocks))
        self.final_layer = FinalLayer(width, latent_channels * cell)
        self.text_section = text

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        model, text = self.section.model_dump(mode="json"), self.text_section.model_dump(mode="json")
        return Card("mmdit", {**model, "text": text, "latent_channels": self.latent_channels}, origin)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        pooled: Tensor,
        condition: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the flow at (x, t).

        x [B,C,t,h,w], t [B] in 0..1 (1 is noise), context [B,S,context_dim], pooled [B,P], condition [B,C+1,t,h,w]
        (mask, then masked latent; None means nothing is given), guidance [B] for a guidance-distilled network
        -> [B,C,t,h,w]. Raises ValueError when a distilled network gets no guidance.
        """
        vec = self._vec(t, pooled, guidance, x.dtype)
        img = self.sp.split(self._embed(x, condition), dim=1)
        txt = self.sp.split(self.txt_in(context), dim=1)
        rope = self._rope(x.shape[2:], context.shape[1], x)
        for index, block in enumerate(self.double_blocks):
            img, txt = self._run(block, index < self.checkpoint_blocks[0], img, txt, vec, rope)
        joint, num_text = torch.cat([txt, img], dim=1), txt.shape[1]
        for index, block in enumerate(self.single_blocks):
            joint = self._run(block, index < self.checkpoint_blocks[1], joint, vec, rope)
        out = self.final_layer(joint[:, num_text:], vec)
        return unpack(self.sp.gather(out, dim=1), tuple(x.shape[2:]), self.section.patch)

    def _vec(self, t: Tensor, pooled: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        vec: Tensor = self.time_in(timestep_embedding(t, TIME_FEATURES).to(dtype)) + self.vector_in(pooled.to(dtype))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            raise ValueError("this network is guidance-distilled (guidance_embed: true): pass guidance [B]")
        guided: Tensor = vec + self.guidance_in(timestep_embedding(guidance, TIME_FEATURES).to(dtype))
        return guided

    def _embed(self, x: Tensor, condition: Tensor | None) -> Tensor:
        img: Tensor = self.img_in(pack(x, self.section.patch))
        if self.cond_in is None:
            return img
        if condition is None:
            condition = x.new_zeros(x.shape[0], self.latent_channels + 1, *x.shape[2:])
        conditioned: Tensor = img + self.cond_in(pack(condition, self.section.patch))
        return conditioned

    def _rope(self, grid: torch.Size, num_text: int, like: Tensor) -> Rope:
        """Cosines and sines [L,D/2] of this rank's tokens, text first; text sits at position (0,0,0)."""
        patch, axes = self.section.patch, self.section.rope_axes
        img = positions((grid[0], grid[1] // patch, grid[2] // patch), like.device)
        ids = torch.cat([self.sp.split(torch.zeros(num_text, 3, device=like.device), 0), self.sp.split(img, 0)])
        angles = rope_angles(ids, axes, self.section.rope_theta)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _run(self, block: nn.Module, recompute: bool, *args: object) -> Any:
        if recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, self.sp, use_reentrant=False)
        return block(*args, self.sp)


class StreamAttention(nn.Module):
    """Projections of one stream (text or picture) of a double block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.norm = QKNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,L,W] -> normed query and key, and value, each [B,N,L,D]."""
        query, key, value = (heads_first(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return (*self.norm(query, key), value)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own that meet in attention."""

    def __init__(self, model: sections.MMDiT) -> None:
        super().__init__()
        width, hidden = model.width, int(model.width * model.mlp_ratio)
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = StreamAttention(width, model.heads), StreamAttention(width, model.heads)
        self.img_mlp, self.txt_mlp = mlp(width, hidden), mlp(width, hidden)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, sp: SequenceParallel) -> tuple[Tensor, Tensor]:
        """img [B,L,W], txt [B,S,W], vec [B,W] -> the same shapes."""
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        txt_qkv = self.txt_attn.project(modulate(txt, txt_mod[0], txt_mod[1]))
        img_qkv = self.img_attn.project(modulate(img, img_mod[0], img_mod[1]))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        joint = heads_last(sp.attention(rotate(query, *rope), rotate(key, *rope), value))
        txt_out, img_out = joint.tensor_split([txt.shape[1]], dim=1)
        img = img + img_mod[2] * self.img_attn.proj(img_out)
        txt = txt + txt_mod[2] * self.txt_attn.proj(txt_out)
        img = img + img_mod[5] * self.img_mlp(modulate(img, img_mod[3], img_mod[4]))
        txt = txt + txt_mod[5] * self.txt_mlp(modulate(txt, txt_mod[3], txt_mod[4]))
        return img, txt


class SingleBlock(nn.Module):
    """One joint stream; attention and MLP run side by side and share their output projection."""

    def __init__(self, model: sections.MMDiT) -> None:
        super().__init__()
        width, hidden = model.width, int(model.width * model.mlp_ratio)
        self.width, self.heads = width, model.heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_mlp = nn.Linear(width, width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.norm = QKNorm(width // model.heads)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope, sp: SequenceParallel) -> Tensor:
        """Joint tokens [B,S+L,W], vec [B,W] -> [B,S+L,W]."""
        shift, scale, gate = self.modulation(vec)
        inner = modulate(x, shift, scale)
        query, key = self.norm(heads_first(self.q_proj(inner), self.heads), heads_first(self.k_proj(inner), self.heads))
        value, hidden = self.v_mlp(inner).tensor_split([self.width], dim=-1)
        joint = sp.attention(rotate(query, *rope), rotate(key, *rope), heads_first(value, self.heads))
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        out: Tensor = x + gate * self.linear2(torch.cat([heads_last(joint), hidden], dim=-1))
        return out


class FinalLayer(nn.Module):
    """Modulated norm and the projection to packed latents."""

    def __init__(self, width: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B,L,W] -> [B,L,C p p]."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out


def build_mmdit(model: sections.MMDiT, text: sections.Text, latent_channels: int) -> MMDiT:
    """The network of a recipe, initialised (random; seed torch first), or empty under `torch.device("meta")`."""
    network = MMDiT(model, text, latent_channels)
    initialise(network)
    return network


def initialise(network: MMDiT) -> None:
    """Xavier-uniform weights and zero biases; modulations, condition and last projection start at zero.

    A fresh network therefore says velocity 0, ignores its condition, and learns both from the first steps (adaLN-Zero,
    arXiv 2212.09748; the zero `cond_in` is Open-Sora 2.0's, om/mmdit/model.py, main).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    silent = [m.lin for m in network.modules() if isinstance(m, Modulation)]
    silent.append(network.final_layer.linear)
    silent += [m for m in network.final_layer.adaLN_modulation if isinstance(m, nn.Linear)]
    silent += [network.cond_in] if network.cond_in is not None else []
    for layer in silent:
        nn.init.zeros_(layer.weight)


def save_mmdit(folder: Path, network: MMDiT, origin: Origin, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the network's weights, or `state` (an EMA of the same names) in their place, in float32."""
    save_weights(folder, network.state_dict() if state is None else state, network.card(origin))


def load_mmdit(folder: Path, network: MMDiT, recipe: str) -> Card:
    """Load a folder of `save_mmdit` into a network of the recipe's size; returns the card.

    Raises CheckpointMismatch when the weights belong to another recipe, kind or size.
    """
    card = read_card(folder)
    check_card(folder, card, network.card(Origin(recipe, card.origin.stage)))
    network.load_state_dict(load_state(folder))
    return card


def pack(x: Tensor, patch: int) -> Tensor:
    """Latents to tokens: [B,C,t,h,w] -> [B, t h/p w/p, C p p], channel slowest."""
    return rearrange(x, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch, pw=patch)


def unpack(tokens: Tensor, grid: tuple[int, ...], patch: int) -> Tensor:
    """Tokens back to latents of grid (t, h, w): the inverse of `pack`."""
    frames, height, width = grid
    sizes = {"t": frames, "h": height // patch, "w": width // patch, "ph": patch, "pw": patch}
    return rearrange(tokens, "b (t h w) (c ph pw) -> b c t (h ph) (w pw)", **sizes)


def positions(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """(t, h, w) of every token of a packed grid: [t h w, 3], in the order of `pack`."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1).float()


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B,L,N D] -> [B,N,L,D]."""
    return rearrange(x, "b l (n d) -> b n l d", n=heads)


def heads_last(x: Tensor) -> Tensor:
    """[B,N,L,D] -> [B,L,N D]."""
    return rearrange(x, "b n l d -> b l (n d)")
