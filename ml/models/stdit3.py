"""STDiT-3 of Open-Sora 1.2, and its windowed variant of 1.3: spatial and temporal blocks that take turns.

Letters: B batch, C latent channels, t h w latent grid, T H W grid of tokens, S = H W, D width of the network, L text
tokens. Parameters carry the names of the released weights (`OpenSora-STDiT-v3`, and `-v4`, `-v4-360p`, `-v4-i2v` for
1.3; om/stdit/stdit3.py of both branches), so those load strictly, in the sizes XL/2 (the default) and 3B/2 (width 1872,
26 heads). 1.3 is `STDiT3(in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True)`.
"""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from ml import architectures
from ml.models.inputs import Inputs
from ml.models.positional import named
from ml.models.recompute import Recompute
from ml.models.sequence import PlainSequence, SequenceParallel, Shared
from ml.models.stdit3_blocks import Heard, Place, STDiT3Block
from ml.models.stdit_layers import (
    CaptionEmbedder,
    Grid,
    Moment,
    PackedText,
    PatchEmbed3D,
    PositionEmbedding2D,
    RotaryTime,
    SizeEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    check_marked,
    pack_text,
    token_grid,
    unpatchify,
)
from ml.models.weights import Card, Origin
from ml.models.windows import Windows, grid_rope, rope_size

# Images stand at this rate in training and sampling (od/datasets.py, 1.2 and 1.3).
IMAGE_FPS = 120.0


class STDiT3Error(ValueError):
    """A forward that lacks what the network needs, or names frames that are not there."""


class Conditions(TypedDict, total=False):
    """What the forward takes by name, or up to text_uncond_prob in this order; `fps`, `height` and `width` are needed.

    fps, height, width [B], of the clip in frames per second and pixels. Only 1.3: cond [B,C,t,h,w] the given latents
    and zero elsewhere, cond_mask [B,C,t,h,w] 1 where given, mask_index the given frames, y_null as `y` the null text,
    text_uncond_prob the caption embedder's dropout in place of `class_dropout_prob`. num_frames and ar are accepted and
    not used.
    """

    fps: Tensor
    height: Tensor
    width: Tensor
    cond: Tensor
    cond_mask: Tensor
    mask_index: Sequence[int] | Tensor | None
    y_null: Tensor | None
    text_uncond_prob: float | None
    num_frames: Tensor
    ar: Tensor


# What can follow x_mask by position: the original ends there (om/stdit/stdit3.py, 1.3).
POSITIONAL = tuple(name for name in Conditions.__annotations__ if name not in ("num_frames", "ar"))


class STDiT3(nn.Module):
    """The network; `checkpoint_blocks` = (how many pairs of blocks recompute their activations in backward, unused).

    Of the original's run-time switches `drop_path`, `only_train_temporal`, `freeze_y_embedder`, `skip_y_embedder`,
    `skip_temporal` and `force_pad_h_for_sp_size` have their effect; `enable_flash_attn` and `enable_layernorm_kernel`
    have none (`ml.models.attention` picks the kernel), nor has `enable_sequence_parallelism`.

    `sp` is the seam of sequence-parallel engines: it cuts the tokens S of every frame, so that only attention within a
    frame, and within windows, speaks to other ranks; frames, text and modulation are whole on every rank.
    """

    def __init__(self, config: architectures.STDiT3 | None = None, **hyper: Any) -> None:
        super().__init__()
        config = config or architectures.hyper_of(architectures.STDiT3, hyper)
        self.config, self.checkpoint_blocks, self.recompute = config, (0, 0), Recompute()
        self.sp: SequenceParallel = PlainSequence()
        width, head_size = config.hidden_size, config.hidden_size // config.num_heads
        windowed = config.kernel_size is not None
        self.pos_embed = PositionEmbedding2D(width)
        self.rope = RotaryTime(rope_size(head_size) if windowed else head_size)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, width)
        if config.embeds_condition:
            self.x_embedder_cond = PatchEmbed3D(config.patch_size, config.in_channels, width)
            self.x_embedder_cond_mask = PatchEmbed3D(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.fps_embedder = SizeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, width, config.model_max_length, config.class_dropout_prob
        )
        rates = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, False, rate) for rate in rates)
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(config, True, rate) for rate in rates if not config.skip_temporal
        )
        patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.final_layer = T2IFinalLayer(width, patch_volume, config.out_channels)
        initialise(self)
        freeze(self)

    @property
    def null_context(self) -> Tensor:
        """[L,caption channels] that stands for no text; [L,D] where the network takes cached features."""
        null = self.y_embedder.y_embedding
        return self.y_embedder.y_proj(null) if self.config.skip_y_embedder else null

    def card(self, origin: Origin) -> Card:
        """What `model.json` says about this network."""
        return Card("stdit3", {**self.config.model_dump(mode="json")}, origin)

    def arguments(self, x: Tensor, t: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Keywords of `forward`: x [B,C,t,h,w], t [B] in 0 to 1000. An image counts as 120 frames per second.

        1.3 hears of given frames by `inputs.condition` and `inputs.given` together, both 1.2 and 1.3 of frames that
        stay clean by `inputs.active`. The null text of given frames has the prompt's length, as the original's has.
        """
        check_marked(self.config.patch_size, inputs.active)
        check_marked(self.config.patch_size, inputs.given)
        sizes = {"height": inputs.height, "width": inputs.width}
        y, mask = self._text(inputs.text.context, inputs.text.mask)
        named = {name: torch.full((x.shape[0],), float(value), device=x.device) for name, value in sizes.items()}
        named["fps"] = torch.full_like(inputs.fps, IMAGE_FPS) if inputs.frames == 1 else inputs.fps
        call = {"x": x, "timestep": t, "y": y, "mask": mask, "x_mask": inputs.active, **named}
        if not self.config.embeds_condition or not inputs.given:
            return call
        if inputs.condition is None:
            raise STDiT3Error(f"frames {inputs.given} are given but no condition is; pass its mask and latents")
        cond = inputs.condition[:, 1:]
        null = self.null_context[: inputs.text.context.shape[1]].expand(x.shape[0], -1, -1)
        y_null, _ = self._text(null.to(inputs.text.context.dtype), inputs.text.mask)
        given = {"cond": cond, "cond_mask": inputs.condition[:, :1].expand_as(cond), "mask_index": list(inputs.given)}
        return {**call, **given, "y_null": y_null}

    def result(self, output: Tensor, x: Tensor) -> Tensor:
        """[B,2C,t,h,w]: the velocity in the first C channels, and the variance that no objective of 1.2 or 1.3 uses."""
        return output

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        *more: Any,
        **others: Unpack[Conditions],
    ) -> Tensor:
        """x [B,C,t,h,w] at timestep [B] (0 to 1000, 1000 is noise) -> float32 [B,2C,t,h,w] (C without `pred_sigma`).

        y [B,1,L,caption channels] with mask [B,L] (1 = a real token; fewer rows than y are repeated); with
        `skip_y_embedder` y [1,sum of lengths,D] and mask the lengths. x_mask [B,T] bool, False where a frame is clean.
        The others are `Conditions`. Raises STDiT3Error when one that is needed is missing.
        """
        conditions = cast(Conditions, named(POSITIONAL, more, others))
        given = _frames(conditions.get("mask_index"))
        _check_conditions(conditions, given, self.config)
        latent = self._pad_rows(x)
        grid = token_grid(latent.shape, self.config.patch_size)
        t, t0, moment = self._moment(timestep, x_mask, conditions["fps"])
        heard = self._heard((y, mask), _within(given, grid[0]), conditions)
        # As Python numbers: half precision ends at 65504 pixels.
        area_px = conditions["height"][0].item() * conditions["width"][0].item()
        scale = area_px**0.5 / self.config.input_sq_size
        tokens = self._embed(latent, conditions)
        tokens = tokens + self.pos_embed(tokens, grid[1], grid[2], scale, round((grid[1] * grid[2]) ** 0.5))
        place, tokens = self._place(grid, scale, tokens), self.sp.split(tokens, dim=2)
        for index, spatial in enumerate(self.spatial_blocks):
            chosen = index < self.checkpoint_blocks[0]
            tokens = self.recompute.run(spatial, chosen, tokens, moment, heard, place)
            for temporal in self.temporal_blocks[index : index + 1]:
                tokens = self.recompute.run(temporal, chosen, tokens, moment, heard, place)
        out = self.sp.gather(self.final_layer(tokens, t, x_mask, t0), 2, grid[1] * grid[2])
        whole = unpatchify(out, latent.shape, self.config.patch_size, self.config.out_channels)
        return whole[:, :, :, : x.shape[3]].float()

    @property
    def _dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def _text(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | list[int]]:
        """The text as `forward` takes it: captions [B,1,L,...] and mask, or cached features in one row and lengths."""
        if not self.config.skip_y_embedder:
            return context[:, None], mask
        packed = pack_text(context[:, None], mask)
        return packed.tokens[None], packed.lengths

    def _pad_rows(self, x: Tensor) -> Tensor:
        """In the network's dtype, with zeros below until `force_pad_h_for_sp_size` divides the rows of tokens."""
        x, unit, patch = x.to(self._dtype), self.config.force_pad_h_for_sp_size or 1, self.config.patch_size[1]
        rows = -(-x.shape[3] // patch)
        if rows % unit == 0:
            return x
        return nn.functional.pad(x, (0, 0, 0, (rows + -rows % unit) * patch - x.shape[3]))

    def _embed(self, latent: Tensor, conditions: Conditions) -> Tensor:
        """Tokens [B,T,S,D] of the padded latent, and of the given latents and their mask where there are any."""
        tokens: Tensor = self.x_embedder(latent)
        if conditions.get("mask_index") is None:
            return tokens
        cond, cond_mask = (self._pad_rows(conditions[name]) for name in ("cond", "cond_mask"))
        embedded: Tensor = tokens + self.x_embedder_cond(cond) + self.x_embedder_cond_mask(cond_mask)
        return embedded

    def _moment(self, timestep: Tensor, x_mask: Tensor | None, fps: Tensor) -> tuple[Tensor, Tensor | None, Moment]:
        """Embeddings of now and (where frames are clean) of time 0, [B,D], and what they make of the blocks.

        1.2 rounds the time to the network's dtype first, which matters in half precision; 1.3 does not.
        """
        if not self.config.embeds_condition:
            timestep = timestep.to(self._dtype)
        rate = self.fps_embedder(fps.repeat(timestep.shape[0] // fps.shape[0]))
        t = self.t_embedder(timestep) + rate
        if x_mask is None:
            return t, None, Moment(self.t_block(t))
        t0 = self.t_embedder(torch.zeros_like(timestep)) + rate
        return t, t0, Moment(self.t_block(t), self.t_block(t0), x_mask)

    def _heard(
        self, text: tuple[Tensor, Tensor | Sequence[int] | None], given: tuple[int, ...], conditions: Conditions
    ) -> Heard:
        (y, mask), dropout, null = text, conditions.get("text_uncond_prob"), conditions.get("y_null")
        prompt = self._encode(y, mask, dropout)
        return Heard(prompt, given, self._encode(null, mask, dropout) if given and null is not None else None)

    def _encode(self, y: Tensor, mask: Tensor | Sequence[int] | None, dropout: float | None) -> PackedText:
        y = y.to(self._dtype)
        if self.config.skip_y_embedder:
            lengths = mask.tolist() if isinstance(mask, Tensor) else mask
            return PackedText(y.flatten(0, -2), [int(length) for length in lengths or ()])
        dropped = None
        if dropout is not None and self.training and self.y_embedder.random_drop:
            dropped = torch.rand(y.shape[0], device=y.device) < dropout
        return pack_text(self.y_embedder(y, dropped), torch.as_tensor(mask) if mask is not None else None)

    def _place(self, grid: Grid, scale: float, like: Tensor) -> Place:
        frames, height, width = grid
        shared, spatial = Shared(self.sp, (height * width,)), None
        if self.config.use_spatial_rope:
            cos, sin = grid_rope(self.rope, (height, width, 1), scale)
            spatial = self.sp.split(cos, dim=0), self.sp.split(sin, dim=0)
        if self.config.kernel_size is None:
            return Place(grid, spatial, self.rope(torch.arange(frames, device=like.device)), None, shared)
        windows = Windows.cut((height, width, frames), self.config.kernel_size)
        return Place(grid, spatial, grid_rope(self.rope, windows.size, scale), windows.mask(like), shared)


def initialise(network: STDiT3) -> None:
    """Xavier-uniform weights and zero biases; temporal blocks, the rate and the condition of 1.3 start silent.

    A fresh network is therefore an image model in every frame, whatever the rate and the given frames (rep3, 1.2;
    om/stdit/stdit3.py, 1.3).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(network.fps_embedder.get_parameter("mlp.0.weight"), std=0.02)
    silent: list[nn.Module] = [network.fps_embedder.mlp[2]]
    for block in network.temporal_blocks:
        silent += [block.get_submodule(name) for name in ("attn.proj", "cross_attn.proj", "mlp.fc2")]
    if network.config.embeds_condition:
        silent += [network.x_embedder_cond, network.x_embedder_cond_mask]
    for module in silent:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def freeze(network: STDiT3) -> None:
    """Freeze what the hyper-parameters `only_train_temporal` and `freeze_y_embedder` say."""
    if network.config.only_train_temporal:
        network.requires_grad_(False)
        network.temporal_blocks.requires_grad_(True)
    if network.config.freeze_y_embedder:
        network.y_embedder.requires_grad_(False)


def _check_conditions(conditions: Conditions, given: tuple[int, ...] | None, config: architectures.STDiT3) -> None:
    needed = ["fps", "height", "width"]
    if given is not None:
        if not config.embeds_condition:
            raise STDiT3Error(
                "only a network that embeds its condition (cond_embed, or kernel_size) takes mask_index; mark clean "
                "frames by x_mask"
            )
        needed += ["cond", "cond_mask", *(["y_null"] if given else [])]
    missing = [name for name in needed if conditions.get(name) is None]
    if missing:
        raise STDiT3Error(f"forward needs {', '.join(missing)} too")


def _frames(mask_index: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    """The given frames, each once; None where no condition is told at all."""
    if mask_index is None:
        return None
    return tuple(dict.fromkeys(mask_index.tolist() if isinstance(mask_index, Tensor) else mask_index))


def _within(given: tuple[int, ...] | None, num_frames: int) -> tuple[int, ...]:
    if any(not 0 <= index < num_frames for index in given or ()):
        raise STDiT3Error(f"mask_index {given} names frames outside 0 to {num_frames - 1}")
    return given or ()
