"""What official names become ours, per generation.

Networks carry the released names, so most rules say nothing. What is left: tables that a network computes itself,
starts from PixArt-alpha and PixArt-Sigma, from a 4-channel STDiT-3 for the 16 channels of 1.3 (all three by
opensora/utils/ckpt_utils.py, 1.0 to 1.3), from FLUX.1 (opensora.md 1.6), and attention names of diffusers before 0.18.

A rule is a list of steps from a few tensors to a few tensors, which run the same on the meta device and on bytes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ml.architectures import Source
from ml.models.official.files import Header, OfficialError
from ml.models.official.looks import looks_like, starts

State = dict[str, Tensor]

PATCH, HALVES, CHANNELS = 4, 2, 4  # rows of a 4-channel final layer: 2x2 cells, mean and variance, channels
TIMES = 4  # a 16-channel latent is entered as four copies of a 4-channel one
Y = "y_embedder.y_embedding"
X = "x_embedder.proj.weight"
# Names of attention in diffusers before 0.18, which the published sd-vae-ft-ema still has.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
COMPUTED = "computed by the network, never learned"
OTHER_LATENT = "belongs to another autoencoder's latent"
BLANK = "starts at zero, which changes nothing until it is trained"


@dataclass(frozen=True)
class Target:
    """The network that weights are for: whose recipe, kind and hyper-parameters, and its names and shapes."""

    recipe: str
    kind: str
    config: Mapping[str, Any]
    wanted: Mapping[str, tuple[int, ...]]

    def rows(self, name: str) -> int:
        """First dimension of one of its tensors; 0 when it has no such tensor."""
        return self.wanted[name][0] if name in self.wanted else 0


@dataclass(frozen=True)
class Step:
    """One conversion, in words and as a function of tensors by name; it passes on what it does not change."""

    how: str
    apply: Callable[[State], State]


@dataclass(frozen=True)
class Rules:
    """A source layout: file names that are left out, ours that may lack a source (pattern -> why), and steps."""

    source: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    initialised: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


def rules_for(headers: Mapping[str, Header], target: Target, source: Source = "auto") -> Rules:
    """The rules from these weights to the target, by what they look like or by the layout that the caller names.

    Raises OfficialError when the layout cannot become this kind of network.
    """
    looks = looks_like(headers)
    chosen = source if source != "auto" else (looks.source if looks and starts(looks, target.kind) else "opensora")
    if chosen.startswith("pixart") and target.kind in ("stdit", "stdit2", "stdit3"):
        return _pixart(chosen, headers, target)
    if chosen == "opensora_4ch" and target.kind == "stdit3":
        return _widened(target)
    if chosen in ("flux", "opensora_ends") and target.kind == "mmdit":
        return _mmdit(chosen, headers, target)
    if chosen != "opensora":
        raise OfficialError(f"source {chosen} starts no {target.kind}; {target.recipe} takes {_takes(target.kind)}")
    if target.kind == "mmdit":
        return _mmdit(chosen, headers, target)
    if target.kind.startswith("stdit"):
        return _stdit(target)
    return _autoencoder(target)


def _takes(kind: str) -> str:
    others = {"stdit3": "opensora_4ch, pixart_alpha, pixart_sigma", "mmdit": "flux, opensora_ends"}
    others |= {"stdit": "pixart_alpha, pixart_sigma", "stdit2": "pixart_alpha, pixart_sigma"}
    return f"opensora, {others[kind]}" if kind in others else "opensora"


# --- STDiT 1.0 to 1.3 ---------------------------------------------------------------------------------------------


def _stdit(target: Target) -> Rules:
    """A release of its own generation; the null caption is fitted to the recipe's length of texts."""
    return Rules("opensora", _tables(target), _computed(target), (_caption_step(target),))


def _tables(target: Target) -> dict[str, str]:
    """Names that a file may carry and that are not read: 1.0's positions always, rotary tables if not wanted."""
    rope = {} if "rope.freqs" in target.wanted else {r"rope\.freqs": COMPUTED}
    return {r"pos_embed(_temporal)?": COMPUTED, **rope}


def _computed(target: Target) -> dict[str, str]:
    """Ours that a release may lack."""
    blank = {r"x_embedder_cond(_mask)?\..+": BLANK} if target.kind == "stdit3" else {}
    return {r"pos_embed(_temporal)?": COMPUTED, r"rope\.freqs": COMPUTED, **blank}


def _pixart(source: str, headers: Mapping[str, Header], target: Target) -> Rules:
    """PixArt's image network as the spatial half of ours; what makes it a video network starts fresh."""
    new = {r".*attn\.[qk]_norm\..+": "PixArt has no q/k norm", r"fps_embedder\..+": "PixArt knows no frame rate"}
    steps = [Step("a time axis of 1", _add_time_axis)]
    if target.kind == "stdit3":
        new |= {r"temporal_blocks\..+": "PixArt has no time"}
        steps.append(Step("blocks are the spatial blocks", _to_spatial))
    else:
        new |= {r"blocks\.\d+\.(attn_temp\..+|scale_shift_table_temporal)": "PixArt has no time"}
        new |= {r"(t_block_temp|fl_embedder)\..+": "PixArt has no time"}
        new |= {r"(csize|ar)_embedder\..+": "only PixArt's multi-scale weights have it"}
    if target.wanted[X][1] == TIMES * CHANNELS:
        steps.append(WIDEN)
    scales = {} if any(name.startswith("csize_embedder.") for name in target.wanted) else _multi_scale(headers)
    return Rules(source, {**_tables(target), **scales}, {**_computed(target), **new}, (*steps, _caption_step(target)))


def _multi_scale(headers: Mapping[str, Header]) -> dict[str, str]:
    found = any(name.startswith(("csize_embedder.", "ar_embedder.")) for name in headers)
    return {r"(csize|ar)_embedder\..+": "this generation embeds no picture size"} if found else {}


def _widened(target: Target) -> Rules:
    """1.2's weights as the start of 1.3: every latent channel is taken for four; windows have rotary tables of theirs.

    Raises OfficialError when the target has no 16 channels.
    """
    if target.wanted[X][1] != TIMES * CHANNELS:
        raise OfficialError(f"source opensora_4ch gives 16 latent channels, {target.recipe} has {target.wanted[X][1]}")
    dropped = {**_tables(target), r"rope\.freqs": COMPUTED}
    return Rules("opensora_4ch", dropped, _computed(target), (WIDEN, _caption_step(target)))


def _caption_step(target: Target) -> Step:
    rows = target.rows(Y)

    def fit(state: State) -> State:
        if Y not in state or len(state[Y]) == rows or not rows:
            return state
        return {**state, Y: fit_caption(state[Y], rows)}

    return Step(f"cut, or its last row repeated, to {rows} tokens", fit)


def fit_caption(null: Tensor, rows: int) -> Tensor:
    """The null caption [L,D] at another length: rows are cut, or the last is repeated."""
    last = null[-1:].expand(max(0, rows - len(null)), -1)
    return torch.cat([null[:rows], last])


def _add_time_axis(state: State) -> State:
    """A kernel over pictures [D,C,h,w] as one over clips, one frame deep [D,C,1,h,w]."""
    return {name: tensor.unsqueeze(2) if name == X and tensor.ndim == 4 else tensor for name, tensor in state.items()}


def _to_spatial(state: State) -> State:
    return {re.sub(r"^blocks\.", "spatial_blocks.", name): tensor for name, tensor in state.items()}


def widen(state: Mapping[str, Tensor]) -> State:
    """A network of 4 latent channels as one of 16 that gives on four copies of a latent four copies of its answer.

    Input kernels [D,4,...] are repeated along channels and divided by 4. Rows of the final layer are (cell, mean or
    variance, channel), channels fastest: the channels of each are repeated. Other tensors pass.
    """
    wide = dict(state)
    for name, tensor in state.items():
        if name == X and tensor.shape[1] == CHANNELS:
            wide[name] = tensor.repeat(1, TIMES, *[1] * (tensor.ndim - 2)) / TIMES
        elif name.startswith("final_layer.linear.") and len(tensor) == PATCH * HALVES * CHANNELS:
            cells = tensor.reshape(PATCH, HALVES, CHANNELS, *tensor.shape[1:])
            wide[name] = cells.repeat(1, 1, TIMES, *[1] * (tensor.ndim - 1)).flatten(0, 2)
    return wide


WIDEN = Step("4 latent channels repeated to 16", widen)


# --- MMDiT --------------------------------------------------------------------------------------------------------


def _mmdit(source: str, headers: Mapping[str, Header], target: Target) -> Rules:
    """Between FLUX.1's layout (fused q, k, v; rotary pairs side by side) and Open-Sora 2.0's (apart; half by half).

    Source `opensora_ends` takes a 2.0 network to another autoencoder: its first and last projections start fresh
    (docs/hcae.md, main).
    """
    from ml.models import mmdit_layouts

    config = target.config
    width, heads = int(config["hidden_size"]), int(config["num_heads"])
    steps = []
    fused = any(re.search(r"\.qkv\.|\.linear1\.", name) for name in headers)
    if fused:
        steps.append(Step("q, k and v (and the MLP) split", lambda state: mmdit_layouts.split_qkv(state, width)))
    if source == "flux" and config["use_liger_rope"]:
        how = "rotary pairs d, d+1 to halves"
        steps.append(Step(how, lambda state: mmdit_layouts.to_half_split(state, heads)))
    if source != "flux" and not config["use_liger_rope"]:
        how = "rotary halves to pairs d, d+1"
        steps.append(Step(how, lambda state: mmdit_layouts.to_interleaved(state, heads)))
    if config["fused_qkv"]:
        steps.append(Step("q, k and v (and the MLP) fused", lambda state: mmdit_layouts.fuse_qkv(state, width)))
    unguided = not any(name.startswith("guidance_in.") for name in target.wanted)
    dropped = {r"guidance_in\..+": "this network is not guidance-distilled (guidance_embed: false)"} if unguided else {}
    if source == "opensora_ends":
        ends = r"(img_in|cond_in|final_layer\.linear)\..+"
        return Rules(source, {**dropped, ends: OTHER_LATENT}, {ends: OTHER_LATENT}, tuple(steps))
    return Rules(source, dropped, {r"cond_in\..+": BLANK}, tuple(steps))


# --- autoencoders -------------------------------------------------------------------------------------------------


def _autoencoder(target: Target) -> Rules:
    """Released names, but for attention that diffusers once named otherwise; normalisation may be the recipe's."""
    statistics = {r"(scale|shift)": "the recipe's autoencoder.latent says it"}
    dropped = {name: why for name, why in statistics.items() if not {"scale", "shift"} & set(target.wanted)}
    steps = (Step("attention under its present names", _renew_attention),) if _two_dimensional(target.kind) else ()
    return Rules("opensora", dropped, {r"(scale|shift)": "a constant of the release"}, steps)


def _two_dimensional(kind: str) -> bool:
    """Kinds that hold diffusers' AutoencoderKL."""
    return kind in ("sd", "opensora_v1_2")


def _renew_attention(state: State) -> State:
    old = "|".join(OLD_ATTENTION)
    pattern = re.compile(rf"(.*\.attentions\.\d+\.)({old})(\.(?:weight|bias))$")
    renamed = {}
    for name, tensor in state.items():
        match = pattern.match(name)
        renamed[match[1] + OLD_ATTENTION[match[2]] + match[3] if match else name] = tensor
    return renamed
