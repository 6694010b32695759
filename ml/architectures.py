"""Hyper-parameters of every network under Open-Sora's names; a transformer's defaults are its original class's.

A recipe's `model` and `autoencoder` sections are these classes, and the networks are built from them:
`STDiT3(depth=28, hidden_size=1152)` and `model: {kind: stdit3, depth: 28, hidden_size: 1152}` say the same. Sizes that
follow from other sections (`in_channels`, `caption_channels`, token lengths) are set by the recipe (`Recipe.network`).
Released values that are not the original's defaults stand in the recipes (`ml/recipes`).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from ml.section import Fraction, Positive, PositiveFloat, Section

# Layouts of released transformer weights (ml/models/official/rules.py).
Source = Literal["auto", "opensora", "opensora_4ch", "opensora_ends", "pixart_alpha", "pixart_sigma", "flux"]
Conditioning = Literal["none", "mask", "embed", "channels"]
Freeze = Literal["not_temporal", "text"]
Patch = tuple[Positive, Positive, Positive]
SixFlags = Annotated[tuple[bool, ...], Field(min_length=6, max_length=6)]

Made = TypeVar("Made", bound=Section)

# What the original's builders, its configuration files and Hugging Face's bookkeeping pass along with the
# hyper-parameters. None of it changes a number here: a network has the dtype and device it is moved to.
RUNTIME = (
    *("type", "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"),
    *("from_pretrained", "force_huggingface", "cache_dir", "strict_load", "adapt_16ch"),
    *("dtype", "torch_dtype", "device_map", "enable_flashattn"),
)
# The original's builders that fix sizes other than the defaults (om/stdit/stdit3.py, 1.2 and 1.3).
BUILDERS: dict[str, dict[str, int]] = {"STDiT3-3B/2": {"hidden_size": 1872, "num_heads": 26}}

# --- transformers -------------------------------------------------------------------------------------------------


class SpatialTemporal(Section):
    """What STDiT, STDiT-2 and STDiT-3 share (om/stdit, 1.0 to 1.3); `patch_size` is (t, h, w)."""

    in_channels: Positive = 4
    patch_size: Patch = (1, 2, 2)
    hidden_size: Positive = 1152
    depth: Positive = 28
    num_heads: Positive = 16
    mlp_ratio: PositiveFloat = 4.0
    class_dropout_prob: Fraction = 0.1
    pred_sigma: bool = True
    drop_path: Fraction = 0.0
    caption_channels: Positive = 4096
    enable_flash_attn: bool | None = None
    enable_layernorm_kernel: bool | None = None
    enable_sequence_parallelism: bool = False

    @property
    def patch(self) -> int:
        """Latent cells along one side of a token."""
        return self.patch_size[1]

    @property
    def out_channels(self) -> int:
        """Channels the network gives: the prediction, and as many for the variance."""
        return self.in_channels * (2 if self.pred_sigma else 1)


class STDiT(SpatialTemporal):
    """Open-Sora 1.0; `space_scale` and `time_scale` stretch the sinusoidal positions (0.5 at 256 px, 1 at 512 px)."""

    kind: Literal["stdit"] = "stdit"
    input_size: tuple[Positive, Positive, Positive] = (1, 32, 32)
    no_temporal_pos_emb: bool = False
    model_max_length: Positive = 120
    space_scale: PositiveFloat = 1.0
    time_scale: PositiveFloat = 1.0
    freeze: Freeze | None = None

    @property
    def conditioning(self) -> Conditioning:
        """1.0 makes whole clips only."""
        return "none"


class STDiT2(SpatialTemporal):
    """Open-Sora 1.1: RoPE before the q/k norm in temporal attention, embedders of size, aspect, length and rate."""

    kind: Literal["stdit2"] = "stdit2"
    input_size: tuple[Positive | None, Positive | None, Positive | None] = (None, None, None)
    input_sq_size: Positive = 32
    no_temporal_pos_emb: bool = False
    model_max_length: Positive = 120
    freeze: Freeze | None = None
    qk_norm: bool = False
    qk_norm_legacy: bool = True

    @property
    def conditioning(self) -> Conditioning:
        """Given frames stay clean in the input, marked by `x_mask`."""
        return "mask"


class STDiT3(SpatialTemporal):
    """Open-Sora 1.2, and with `kernel_size` (H, W, T; -1 = the whole axis) the windowed network of 1.3.

    `cond_embed` = the embedders of given latents and their mask, which every network of 1.3 has and none of 1.2; None
    follows `kernel_size`. It stands beside it because 1.3 also trained without windows (its image model).
    """

    kind: Literal["stdit3"] = "stdit3"
    input_size: tuple[Positive | None, Positive | None, Positive | None] = (None, None, None)
    input_sq_size: Positive = 512
    force_pad_h_for_sp_size: Positive | None = None
    model_max_length: Positive = 300
    qk_norm: bool = True
    qk_norm_legacy: bool = False
    kernel_size: tuple[int, int, int] | None = None
    cond_embed: bool | None = None
    use_spatial_rope: bool = False
    only_train_temporal: bool = False
    freeze_y_embedder: bool = False
    skip_y_embedder: bool = False
    skip_temporal: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.use_spatial_rope and self.kernel_size is None:
            raise ValueError("use_spatial_rope turns a third of a head per axis, as windows do: give kernel_size too")
        if self.qk_norm_legacy and self.kernel_size is not None:
            raise ValueError("qk_norm_legacy (rope before the norm) was never windowed: drop it, or kernel_size")
        if self.only_train_temporal and self.skip_temporal:
            raise ValueError("only_train_temporal leaves nothing to train in a network with skip_temporal: drop one")
        return self

    @property
    def embeds_condition(self) -> bool:
        """Whether given latents and their mask have embedders of their own, as in 1.3."""
        return self.kernel_size is not None if self.cond_embed is None else self.cond_embed

    @property
    def conditioning(self) -> Conditioning:
        """1.2 marks clean frames; 1.3 embeds the given latents and their mask."""
        return "embed" if self.embeds_condition else "mask"


class MMDiT(Section):
    """Open-Sora 2.0 (om/mmdit/model.py, main); `in_channels` counts a whole token: latent channels x patch x patch."""

    kind: Literal["mmdit"] = "mmdit"
    in_channels: Positive = 64
    vec_in_dim: Positive = 768
    context_in_dim: Positive = 4096
    hidden_size: Positive = 3072
    mlp_ratio: PositiveFloat = 4.0
    num_heads: Positive = 24
    depth: Positive = 19
    depth_single_blocks: Annotated[int, Field(ge=0)] = 38
    axes_dim: tuple[Positive, Positive, Positive] = (16, 56, 56)
    theta: PositiveFloat = 10_000.0
    qkv_bias: bool = True
    guidance_embed: bool = False
    cond_embed: bool = False
    fused_qkv: bool = True
    patch_size: Positive = 2
    use_liger_rope: bool = False
    grad_ckpt_settings: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _axes_fill_a_head(self) -> "MMDiT":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide hidden_size {self.hidden_size}")
        head = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head or any(size % 2 for size in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} must be even and add up to the head size {head}")
        return self

    @property
    def patch(self) -> int:
        """Latent cells along one side of a token."""
        return self.patch_size

    @property
    def conditioning(self) -> Conditioning:
        """The given latent and its mask are further channels of every token."""
        return "channels" if self.cond_embed else "none"


Model = Annotated[STDiT | STDiT2 | STDiT3 | MMDiT, Field(discriminator="kind")]


class HyperParameterError(ValueError):
    """A hyper-parameter that asks a constructor for more than to build a network."""


def hyper_of(section: type[Made], hyper: Mapping[str, Any]) -> Made:
    """The section of a transformer built under the original's names, its builders' and Hugging Face's (`RUNTIME`) too.

    Recipes do not pass here: their sections know hyper-parameters only. `adapt_16ch` means a network of 1.3. Raises
    HyperParameterError when weights are asked for by `from_pretrained`, ValidationError for unknown names.
    """
    if hyper.get("from_pretrained"):
        raise HyperParameterError(
            f"from_pretrained={hyper['from_pretrained']!r}: a constructor loads no weights; convert them with "
            "`opensora weights import` and load its folder with ml.models.networks.load_network"
        )
    kept = {name: value for name, value in hyper.items() if name not in RUNTIME}
    if hyper.get("adapt_16ch") and section is STDiT3:
        kept = {"cond_embed": True, **kept}
    return section(**{**BUILDERS.get(str(hyper.get("type")), {}), **kept})


# --- autoencoders -------------------------------------------------------------------------------------------------


class Latent(Section):
    """How raw latents become those a transformer sees: (z - mean) / std * scale; empty = 0 and 1 for every channel."""

    scale: PositiveFloat = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[PositiveFloat, ...] = ()


class StableDiffusionNet(Section):
    """Per-frame autoencoder of Stable Diffusion, under diffusers' names (`AutoencoderKL`)."""

    kind: Literal["sd"] = "sd"
    latent_channels: Positive = 4
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    norm_num_groups: Positive = 32
    micro_batch_size: Positive | None = None


class OpenSoraV12Net(Section):
    """OpenSora-VAE 1.2: a per-frame autoencoder, then a temporal one on its latents, 17 frames at a time.

    A `micro_frame_size` of None takes whole clips at once.
    """

    kind: Literal["opensora_v1_2"] = "opensora_v1_2"
    latent_channels: Positive = 4
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    norm_num_groups: Positive = 32
    filters: Positive = 128
    num_res_blocks: Positive = 4
    channel_multipliers: tuple[Positive, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: Positive = 32
    micro_frame_size: Positive | None = 17
    micro_batch_size: Positive | None = None


class OpenSoraV13Net(Section):
    """OpenSora-VAE 1.3: one network for space and time, windows of 17 frames that share a frame.

    A `micro_frame_size` of None takes whole clips at once. The last four names bound memory and change no result:
    convolutions in slices of `tile_size`, so many clips, and so many frames in 2-D layers, at a time.
    """

    kind: Literal["opensora_v1_3"] = "opensora_v1_3"
    latent_channels: Positive = 16
    ch: Positive = 128
    ch_mult: Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)] = (1, 2, 4, 4)
    num_res_blocks: Positive = 2
    num_groups: Positive = 32
    micro_frame_size: Positive | None = 17
    temporal_overlap: bool = True
    use_tiled_conv3d: bool = False
    tile_size: Positive = 16
    micro_batch_size: Positive | None = None
    micro_batch_size_2d: Positive | None = None


class HunyuanNet(Section):
    """The causal 4x8x8 autoencoder of HunyuanVideo, under diffusers' names (`AutoencoderKLHunyuanVideo`).

    Tiling, where it is switched on, cuts planes above `sample_size` pixels (`use_spatial_tiling`) and clips above
    `sample_tsize` frames (`use_temporal_tiling`). Open-Sora 2.0 trains and samples with tiles in space only
    (cfg/diffusion/inference/256px.py and train/image.py, main), and longer clips in one piece.
    """

    kind: Literal["hunyuan"] = "hunyuan"
    latent_channels: Positive = 16
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=4, max_length=4)] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    norm_num_groups: Positive = 32
    use_spatial_tiling: bool = True
    use_temporal_tiling: bool = False
    sample_size: Positive = 256
    sample_tsize: Positive = 64
    tile_overlap_factor: Fraction = 0.25


class DCAENet(Section):
    """Video DC-AE, 4x32x32: six stages, of which the last `num_vit_stages` are linear-attention blocks.

    The shortcuts average and repeat whole groups of channels: a width divides four times the one before it, and is
    divided by four times the one after it; the latent's channels divide the last width. Two halvings in time.
    Tiling, where it is switched on, cuts space and time, as both published configurations do
    (cfg/diffusion/inference and train/high_compression.py, main).
    """

    kind: Literal["dc_ae"] = "dc_ae"
    latent_channels: Positive = 128
    widths: Annotated[tuple[Positive, ...], Field(min_length=6, max_length=6)] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: Annotated[tuple[Positive, ...], Field(min_length=6, max_length=6)] = (2, 2, 2, 3, 3, 3)
    decoder_depths: Annotated[tuple[Positive, ...], Field(min_length=6, max_length=6)] = (3, 3, 3, 3, 3, 3)
    num_vit_stages: Positive = 3
    temporal_downsample: SixFlags = (False, False, False, True, True, False)
    attention_head_dim: Positive = 32
    use_spatial_tiling: bool = True
    use_temporal_tiling: bool = True
    spatial_tile_size: Positive = 256
    temporal_tile_size: Positive = 32
    tile_overlap_factor: Fraction = 0.25

    @model_validator(mode="after")
    def _shortcuts_fit(self) -> "DCAENet":
        for before, after in pairwise(self.widths):
            if 4 * before % after or 4 * after % before:
                raise ValueError(
                    f"widths {before} and {after} cannot follow each other: each must divide 4 x the other"
                )
        if self.widths[-1] % self.latent_channels:
            raise ValueError(f"latent_channels {self.latent_channels} must divide the last width {self.widths[-1]}")
        odd = [w for w in self.widths[len(self.widths) - self.num_vit_stages :] if w % self.attention_head_dim]
        if odd or self.num_vit_stages > len(self.widths):
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} must divide the attention widths, not {odd}"
            )
        if sum(self.temporal_downsample[:-1]) != 2 or self.temporal_downsample[-1]:
            raise ValueError("temporal_downsample must name two of the first five stages: DC-AE is 4x in time")
        return self


AutoencoderNet = Annotated[
    StableDiffusionNet | OpenSoraV12Net | OpenSoraV13Net | HunyuanNet | DCAENet, Field(discriminator="kind")
]
