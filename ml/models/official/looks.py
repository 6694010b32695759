"""What weights look like: the generation that their names and shapes give away, and the recipe they belong to.

Names are those of opensora.md 1.1 to 1.7 and of the projects that Open-Sora started from: PixArt-alpha (T5 of 120
tokens) and PixArt-Sigma (300), FLUX.1, and the autoencoders that diffusers and the original Stable Diffusion write.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ml.models.official.files import Header

Part = Literal["transformer", "autoencoder"]
SIGMA_TOKENS = 300


@dataclass(frozen=True)
class Looks:
    """A generation of weights: whose they are in words, the kind of network, its recipe ("" = none) and its part."""

    title: str
    kind: str
    recipe: str
    part: Part = "transformer"
    source: str = "opensora"


STDIT = Looks("1.0's STDiT", "stdit", "v1_0")
STDIT2 = Looks("1.1's STDiT-2", "stdit2", "v1_1")
STDIT3 = Looks("1.2's STDiT-3", "stdit3", "v1_2")
STDIT3_WINDOWS = Looks("1.3's windowed STDiT-3", "stdit3", "v1_3")
MMDIT = Looks("2.0's MMDiT", "mmdit", "v2_0")
MMDIT_DC_AE = Looks("2.0's MMDiT for DC-AE latents", "mmdit", "v2_0_hc")
FLUX = Looks("FLUX.1's transformer", "mmdit", "v2_0", source="flux")
PIXART_ALPHA = Looks("PixArt-alpha", "pixart", "v1_0", source="pixart_alpha")
PIXART_SIGMA = Looks("PixArt-Sigma", "pixart", "v1_2", source="pixart_sigma")
FLUX_DIFFUSERS = Looks("FLUX.1 in diffusers' layout (use the file of its makers)", "", "")
DIT = Looks("a DiT or Latte, which no recipe has", "", "")
SD = Looks("Stable Diffusion's autoencoder", "sd", "v1_0", "autoencoder")
LDM = Looks("an autoencoder in Stable Diffusion's or FLUX.1's own layout (use diffusers')", "", "", "autoencoder")
VAE_V12 = Looks("OpenSora-VAE 1.2", "opensora_v1_2", "v1_2", "autoencoder")
VAE_V13 = Looks("OpenSora-VAE 1.3", "opensora_v1_3", "v1_3", "autoencoder")
HUNYUAN = Looks("HunyuanVideo's autoencoder", "hunyuan", "v2_0", "autoencoder")
DC_AE = Looks("Video DC-AE", "dc_ae", "v2_0_hc", "autoencoder")

# The first pattern that a name matches decides, so the more telling ones come first.
MARKS: tuple[tuple[str, Looks], ...] = (
    (r"(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.", FLUX),
    (r"double_blocks\.\d+\.|single_blocks\.\d+\.(v_mlp|q_proj)\.", MMDIT),
    (r"single_transformer_blocks\.\d+\.", FLUX_DIFFUSERS),
    (r"x_embedder_cond\.", STDIT3_WINDOWS),
    (r"spatial_blocks\.\d+\.", STDIT3),
    (r"t_block_temp\.", STDIT2),
    (r"blocks\.\d+\.attn_temp\.", STDIT),
    (r"y_embedder\.embedding_table\.|temp_embed$", DIT),
    (r"blocks\.\d+\.cross_attn\.kv_linear\.", PIXART_ALPHA),
    (r"temporal_vae\.", VAE_V12),
    (r"(en|de)coder\.stages\.\d+\.", DC_AE),
    (r"encoder\.down_blocks\.\d+\.resnets\.\d+\.conv1\.conv\.", HUNYUAN),
    (r"encoder\.down_blocks\.\d+\.resnets\.", SD),
    (r"encoder\.down\.\d+\.block\.\d+\.conv1\.conv\.", VAE_V13),
    (r"encoder\.down\.\d+\.block\.", LDM),
)


def looks_like(headers: Mapping[str, Header]) -> Looks | None:
    """The generation that these names and shapes belong to, or None when nothing is familiar."""
    found = next((looks for pattern, looks in MARKS if any(re.match(pattern, name) for name in headers)), None)
    if found is STDIT3 and _size(headers, "x_embedder.proj.weight", 1) == 16:
        return STDIT3_WINDOWS
    if found is PIXART_ALPHA and _size(headers, "y_embedder.y_embedding", 0) >= SIGMA_TOKENS:
        return PIXART_SIGMA
    if found is MMDIT and _size(headers, "img_in.weight", 1) == 128:
        return MMDIT_DC_AE
    return found


def starts(looks: Looks, kind: str) -> bool:
    """Whether weights of another project are a start for this kind of network (`--source` may be left out)."""
    return looks.source != "opensora" and (looks.kind == kind or (looks.kind == "pixart" and kind.startswith("stdit")))


def _size(headers: Mapping[str, Header], name: str, dim: int) -> int:
    """One dimension of a tensor; 0 when there is none."""
    shape = headers[name].shape if name in headers else ()
    return shape[dim] if len(shape) > dim else 0
