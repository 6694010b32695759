"""STDiT-2 of Open-Sora 1.1: any size and length, told so by embeddings, and frames that may be given.

Letters: B batch, C latent channels, t h w latent grid, T S tokens (frames, and tokens of a frame), D width, L text
tokens. Parameters carry the names of the released weights (om/stdit/stdit2.py, 1.1).
"""

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

import torch
from einops import rearrange
from torch import Tensor, nn

from ml import architectures
from ml.models.inputs import Inputs
from ml.models.layers import modulate
from ml.models.positional import named
from ml.models.recompute import Recompute
from ml.models.sequence import PlainSequence, SequenceParallel, Shared
from ml.models.stdit_layers import (
    Attention,
    CaptionEmbedder,
    Mlp,
    Moment,
    MultiHeadCrossAttention,
    PackedText,
    PatchEmbed3D,
    PositionEmbedding2D,
    Rope,
    RotaryTime,
    SizeEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    check_marked,
    drop_path,
    freeze_parameters,
    initialise,
    pack_text,
    table,
    token_grid,
    unpatchify,
    vectors,
)
from ml.models.weights import Card, Origin

# The frame rate that stands for "a still picture" (IMG_FPS, opensora/datasets/datasets.py, 1.1).
IMAGE_FPS = 120.0


class ClipFactsMissing(ValueError):  # noqa: N818  (the house names it so)
    """The network was not told the size, shape, length or rate of the clips."""


class ClipFacts(TypedDict, total=False):
    """What the forward is told of the clips, [B] each, in this order: frames, height and width in pixels, ar (width /
    height), fps. All five are needed; where there are fewer than latents they are repeated, as for guidance originally.
    """

    num_frames: Tensor
    height: Tensor
    width: Tensor
    ar: Tensor
    fps: Tensor


class STDiT2(nn.Module):
    """The network; `checkpoint_blocks` = (blocks that recompute their activations in backward, unused).

    Of the runtime settings, `drop_path` and `freeze` do what they say. `enable_flash_attn`, `enable_layernorm_kernel`
    and `enable_sequence_parallelism` change nothing (attention picks its own kernel), nor do `input_size` and
    `no_temporal_pos_emb`, which the original ignores too. `class_dropout_prob` acts only when `y_embedder.random_drop`
    is set. `qk_norm_legacy` turns queries and keys before their norm; the released 1.1 weights were trained so.

    `sp` is the seam of sequence-parallel engines: it cuts the tokens S of every frame, so that only attention within a
    frame speaks to other ranks; frames, text and modulation are whole on every rank.
    """

    def __init__(self, config: architectures.STDiT2 | None = None, **hyper: Any) -> None:
        super().__init__()
        self.config = config = config or architectures.hyper_of(architectures.STDiT2, hyper)
        self.checkpoint_blocks, self.recompute = (0, 0), Recompute()
        self.sp: SequenceParallel = PlainSequence()
        width, patch = config.hidden_size, config.patch_size
        self.pos_embed = PositionEmbedding2D(width)
        self.x_embedder = PatchEmbed3D(patch, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, width, config.model_max_length, config.class_dropout_prob
        )
        self.rope = RotaryTime(width // config.num_heads)
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        blocks = [STDiT2Block(config, rate) for rate in rates]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = T2IFinalLayer(width, patch[0] * patch[1] * patch[2], config.out_channels)
        self.csize_embedder, self.ar_embedder = SizeEmbedder(width // 3), SizeEmbedder(width // 3)
        self.fl_embedder, self.fps_embedder = SizeEmbedder(width), SizeEmbedder(width)
        initialise(
            self,
            gaussian=[self.t_embedder, self.t_block, self.t_block_temp, self.y_embedder],
            silent=[*(proj for block in blocks for proj in block.silent()), self.final_layer],
        )
        freeze_parameters(self, config.freeze)

    @property
    def null_context(self) -> Tensor:
        """[L,caption channels] that stands for no text."""
        return self.y_embedder.y_embedding

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Keywords of forward; x [B,C,t,h,w], t [B] in 0..1000.

        The aspect ratio is width over height, as in the original's training data (its inference turns it over).
        """
        check_marked(self.config.patch_size, inputs.active)
        facts: dict[str, float] = {"num_frames": inputs.frames, "height": inputs.height, "width": inputs.width}
        facts |= {"ar": inputs.width / inputs.height} | ({"fps": IMAGE_FPS} if inputs.frames == 1 else {})
        told = {name: torch.full((len(x),), float(fact), device=x.device) for name, fact in facts.items()}
        text = inputs.text
        call = {"x": x, "timestep": t, "y": text.context[:, None], "mask": text.mask, "x_mask": inputs.active}
        return {**call, "fps": inputs.fps, **told}

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        """The output, which has the layout of the house already: [B,C or 2C,t,h,w]."""
        return output

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        return Card(self.config.kind, self.config.model_dump(mode="json"), origin)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *told: Tensor,
        **facts: Unpack[ClipFacts],
    ) -> Tensor:
        """Noise (and the variance's interpolation, when `pred_sigma`) at step `timestep`.

        x [B,C,t,h,w], timestep [B] in 0..1000, y [B,1,L,caption channels], mask [B,L] of real text tokens (None = all),
        x_mask [B,T] True where a frame is being denoised (None = everywhere), and `ClipFacts`, by name or in order ->
        float32 [B,C or 2C,t,h,w]. Positions follow the first clip's pixels. Raises ClipFactsMissing when a fact is
        missing.
        """
        config, dtype = self.config, self.x_embedder.proj.weight.dtype
        frames, tall, wide, aspect, rate = _all_five(named(tuple(ClipFacts.__annotations__), told, facts), len(x))
        space = torch.cat([self.csize_embedder(torch.stack([tall, wide], dim=1)), self.ar_embedder(aspect)], dim=1)
        length = self.fl_embedder(frames) + self.fps_embedder(rate)
        t = self.t_embedder(timestep.to(dtype))
        t0 = None if x_mask is None else self.t_embedder(torch.zeros_like(timestep, dtype=dtype))
        spatial, temporal = (
            Moment(net(t + told), None if t0 is None else net(t0 + told), x_mask)
            for net, told in ((self.t_block, space), (self.t_block_temp, length))
        )
        tokens = self._tokens(x.to(dtype), (tall[0].item() * wide[0].item()) ** 0.5)
        shared, tokens = Shared(self.sp, (tokens.shape[2],)), self.sp.split(tokens, dim=2)
        text = pack_text(self.y_embedder(y.to(dtype)), mask)
        rope = self.rope(torch.arange(tokens.shape[1], device=x.device))
        for index, block in enumerate(self.blocks):
            chosen = index < self.checkpoint_blocks[0]
            tokens = self.recompute.run(block, chosen, tokens, spatial, temporal, text, rope, shared)
        # Active frames end with the plain time embedding, given ones with time 0 and the clip's size: as released.
        out = self.final_layer(tokens, t, x_mask, None if t0 is None else t0 + space)
        out = self.sp.gather(out, 2, shared.tokens[0])
        return unpatchify(out, x.shape, config.patch_size, config.out_channels).float()

    def _tokens(self, x: Tensor, side_px: float) -> Tensor:
        """Tokens [B,T,S,D] with their position; `side_px` = side of a square of the clip's area."""
        _, height, width = token_grid(x.shape, self.config.patch_size)
        scale, base_size = side_px / self.config.input_sq_size, round((height * width) ** 0.5)
        tokens: Tensor = self.x_embedder(x)
        positioned: Tensor = tokens + self.pos_embed(tokens, height, width, scale, base_size)
        return positioned


class STDiT2Block(nn.Module):
    """Gated spatial attention, gated temporal attention with a norm of its own, cross-attention, gated MLP."""

    def __init__(self, config: architectures.STDiT2, drop_path_rate: float) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.drop_path_rate = drop_path_rate
        self.attn = Attention(width, heads, config.qk_norm)
        self.scale_shift_table = table(6, width)
        self.cross_attn = MultiHeadCrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.attn_temp = Attention(width, heads, config.qk_norm, config.qk_norm_legacy)
        self.scale_shift_table_temporal = table(3, width)

    def silent(self) -> tuple[nn.Linear, nn.Linear]:
        """Layers that start at zero, so that a network grown from an image model begins as that model."""
        return self.cross_attn.proj, self.attn_temp.proj

    def forward(
        self, x: Tensor, spatial: Moment, temporal: Moment, text: PackedText, rope: Rope, shared: Shared
    ) -> Tensor:
        """[B,T,S,D] -> the same shape."""
        batch = len(x)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors(self.scale_shift_table, spatial)
        heard = self.attn(modulate(x, shift, scale).flatten(0, 1), None, shared).unflatten(0, (batch, -1))
        x = x + self._dropped(gate * heard)
        shift, scale, gate = vectors(self.scale_shift_table_temporal, temporal)
        heard = self.attn_temp(rearrange(modulate(x, shift, scale), "b t s d -> (b s) t d"), rope)
        x = x + self._dropped(gate * rearrange(heard, "(b s) t d -> b t s d", b=batch))
        x = x + self.cross_attn(x, text)
        return x + self._dropped(mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale)))

    def _dropped(self, residual: Tensor) -> Tensor:
        return drop_path(residual, self.drop_path_rate, self.training)


def _all_five(facts: Mapping[str, Tensor], batch: int) -> tuple[Tensor, ...]:
    """Facts in the order of `ClipFacts`, [batch] each."""
    missing = [name for name in ClipFacts.__annotations__ if facts.get(name) is None]
    if missing:
        raise ClipFactsMissing(f"STDiT-2 was not told {', '.join(missing)} of the clips; pass them by name, [B] each")
    return tuple(facts[name].repeat(batch // len(facts[name])) for name in ClipFacts.__annotations__)
