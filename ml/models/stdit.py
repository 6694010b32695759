"""STDiT of Open-Sora 1.0: spatial attention, temporal attention and text in every block, for whole clips of one size.

Letters: B batch, C latent channels, t h w latent grid, T S tokens (frames, and tokens of a frame), D width, L text
tokens. Parameters carry the names of the released weights (om/stdit/stdit.py, 1.0).
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ml import architectures
from ml.models.inputs import Inputs
from ml.models.layers import modulate
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
    T2IFinalLayer,
    TimestepEmbedder,
    drop_path,
    freeze_parameters,
    initialise,
    pack_text,
    plane,
    sincos,
    table,
    token_grid,
    unpatchify,
    vectors,
)
from ml.models.weights import Card, Origin


class STDiT(nn.Module):
    """The network; `checkpoint_blocks` = (blocks that recompute their activations in backward, unused).

    Of the runtime settings, `drop_path` and `freeze` do what they say. `enable_flash_attn`, `enable_layernorm_kernel`
    and `enable_sequence_parallelism` change nothing (attention picks its own kernel), nor does `no_temporal_pos_emb`,
    which the original ignores too. `class_dropout_prob` acts only when `y_embedder.random_drop` is set.

    `pos_embed` [1,S,D] and `pos_embed_temporal` [1,T,D] are the position tables of `input_size`, kept with the weights
    though nothing is learned in them; a latent of another size gets tables of its own. Dividing positions by
    `time_scale` is what the released code does (om/layers/blocks.py), against a multiplication stated elsewhere.

    `sp` is the seam of sequence-parallel engines: it cuts the tokens S of every frame, so that only attention within a
    frame speaks to other ranks; frames, text and modulation are whole on every rank.
    """

    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(self, config: architectures.STDiT | None = None, **hyper: Any) -> None:
        super().__init__()
        self.config = config = config or architectures.hyper_of(architectures.STDiT, hyper)
        self.checkpoint_blocks, self.recompute = (0, 0), Recompute()
        self.sp: SequenceParallel = PlainSequence()
        width, patch = config.hidden_size, config.patch_size
        grid = tuple(size // cell for size, cell in zip(config.input_size, patch, strict=True))
        self.register_buffer("pos_embed", self.spatial_positions(grid[1], grid[2]))
        self.register_buffer("pos_embed_temporal", self.temporal_positions(grid[0]))
        self.x_embedder = PatchEmbed3D(patch, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, width, config.model_max_length, config.class_dropout_prob
        )
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        blocks = [STDiTBlock(config, rate) for rate in rates]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = T2IFinalLayer(width, patch[0] * patch[1] * patch[2], config.out_channels)
        initialise(
            self,
            gaussian=[self.t_embedder, self.t_block, self.y_embedder],
            silent=[*(proj for block in blocks for proj in block.silent()), self.final_layer],
        )
        freeze_parameters(self, config.freeze)

    @property
    def null_context(self) -> Tensor:
        """[L,caption channels] that stands for no text."""
        return self.y_embedder.y_embedding

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Keywords of forward; x [B,C,t,h,w], t [B] in 0..1000."""
        return {"x": x, "timestep": t, "y": inputs.text.context[:, None], "mask": inputs.text.mask}

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        """The output, which has the layout of the house already: [B,C or 2C,t,h,w]."""
        return output

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        return Card(self.config.kind, self.config.model_dump(mode="json"), origin)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Noise (and the variance's interpolation, when `pred_sigma`) at step `timestep`.

        x [B,C,t,h,w], timestep [B] in 0..1000, y [B,1,L,caption channels], mask [B,L] of real text tokens (None = all)
        -> float32 [B,C or 2C,t,h,w].
        """
        config, dtype = self.config, self.x_embedder.proj.weight.dtype
        shape = x.shape
        spatial, temporal = self._positions(token_grid(shape, config.patch_size))
        tokens = self.x_embedder(x.to(dtype))
        tokens = tokens + spatial.to(tokens.dtype)
        shared, tokens = Shared(self.sp, (tokens.shape[2],)), self.sp.split(tokens, dim=2)
        t = self.t_embedder(timestep.to(dtype))
        text = pack_text(self.y_embedder(y.to(dtype)), mask)
        moment = Moment(self.t_block(t))
        for index, block in enumerate(self.blocks):
            start = temporal.to(tokens.dtype) if index == 0 else None
            tokens = self.recompute.run(block, index < self.checkpoint_blocks[0], tokens, moment, text, shared, start)
        out = self.sp.gather(self.final_layer(tokens, t), 2, shared.tokens[0])
        return unpatchify(out, shape, config.patch_size, config.out_channels).float()

    def spatial_positions(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """Sinusoidal positions [1,height x width,D] of a frame's tokens, their index divided by `space_scale`.

        A frame of another area than `input_size` is stretched to the same range, which is how 1.0 was published: 0.5 at
        256 px and 1.0 at 512 px (cfg/opensora/inference, 1.0).
        """
        native = math.prod(
            size // cell for size, cell in zip(self.config.input_size[1:], self.config.patch_size[1:], strict=True)
        )
        scale = self.config.space_scale * math.sqrt(height * width / native)
        rows, columns = (torch.arange(size, device=device, dtype=torch.float64) / scale for size in (height, width))
        return plane(rows, columns, self.config.hidden_size)[None].float()

    def temporal_positions(self, frames: int, device: torch.device | None = None) -> Tensor:
        """Sinusoidal positions [1,frames,D] of frames, their index divided by `time_scale`."""
        steps = torch.arange(frames, device=device, dtype=torch.float64) / self.config.time_scale
        return sincos(steps, self.config.hidden_size)[None].float()

    def _positions(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Tables of a grid of tokens: those kept with the weights where they fit."""
        sizes = [size // cell for size, cell in zip(self.config.input_size, self.config.patch_size, strict=True)]
        device = self.pos_embed.device
        spatial = self.pos_embed if sizes[1:] == [*grid[1:]] else self.spatial_positions(grid[1], grid[2], device)
        temporal = self.pos_embed_temporal if sizes[0] == grid[0] else self.temporal_positions(grid[0], device)
        return spatial, temporal


class STDiTBlock(nn.Module):
    """Gated spatial attention, temporal attention, cross-attention, gated MLP."""

    def __init__(self, config: architectures.STDiT, drop_path_rate: float) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.drop_path_rate = drop_path_rate
        self.attn = Attention(width, heads)
        self.cross_attn = MultiHeadCrossAttention(width, heads)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.scale_shift_table = table(6, width)
        self.attn_temp = Attention(width, heads)

    def silent(self) -> tuple[nn.Linear, nn.Linear]:
        """Layers that start at zero, so that a network grown from an image model begins as that model."""
        return self.cross_attn.proj, self.attn_temp.proj

    def forward(self, x: Tensor, moment: Moment, text: PackedText, shared: Shared, temporal: Tensor | None) -> Tensor:
        """[B,T,S,D] -> the same shape; `temporal` [1,T,D] is given to the first block only.

        Temporal attention hears the raw tokens, neither normed nor modulated, and shares the gate of spatial attention.
        """
        batch = len(x)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors(self.scale_shift_table, moment)
        heard = self.attn(modulate(x, shift, scale).flatten(0, 1), None, shared).unflatten(0, (batch, -1))
        x = x + self._dropped(gate * heard)
        series = rearrange(x, "b t s d -> (b s) t d")
        heard = self.attn_temp(series if temporal is None else series + temporal)
        x = x + self._dropped(gate * rearrange(heard, "(b s) t d -> b t s d", b=batch))
        x = x + self.cross_attn(x, text)
        return x + self._dropped(mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale)))

    def _dropped(self, residual: Tensor) -> Tensor:
        return drop_path(residual, self.drop_path_rate, self.training)
