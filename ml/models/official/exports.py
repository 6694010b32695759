"""Our weights in the layouts that others read: Open-Sora's own, FLUX.1's, diffusers'.

What came in through `rules` goes out as it was, bit for bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ml.models.official.convert import Arrived, apply, arrive, groups
from ml.models.official.files import Header, Official, OfficialError
from ml.models.official.rules import Rules, Step
from ml.models.weights import Card

Layout = Literal["opensora", "flux", "diffusers"]

# Kinds whose parameters carry diffusers' names: its class, and its names for blocks of the encoder and the decoder.
DIFFUSERS = {
    "sd": ("AutoencoderKL", "DownEncoderBlock2D", "UpDecoderBlock2D"),
    "hunyuan": ("AutoencoderKLHunyuanVideo", "HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D"),
}


@dataclass(frozen=True)
class Export:
    """Weights on their way out: names with dtype and shape, what was done, and diffusers' config ({} elsewhere)."""

    ours: Official
    rules: Rules
    arrived: Mapping[str, Arrived]
    notes: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def headers(self) -> dict[str, Header]:
        """Name -> (dtype, shape) in the official layout."""
        return {name: made.header for name, made in self.arrived.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors in the official layout, read and converted group by group."""
        kept = [name for name in self.ours.headers if name not in self.rules.dropped]
        for names in groups(kept):
            yield from apply({name: self.ours.read(name) for name in names}, self.rules.steps)[0].items()


def export(ours: Official, card: Card, layout: Layout) -> Export:
    """Plan the way of a weights folder into a layout; raises OfficialError when this network has no such layout."""
    if layout == "diffusers" and card.kind not in DIFFUSERS:
        raise OfficialError(
            f"diffusers has no network of kind {card.kind}; it has {', '.join(DIFFUSERS)}, and reads a 2.0 "
            "transformer without condition from --layout flux"
        )
    if layout == "flux" and card.kind != "mmdit":
        raise OfficialError(f"FLUX.1's layout is for kind mmdit, these weights are {card.kind}; use --layout opensora")
    steps = _mmdit_steps(card.config, layout) if card.kind == "mmdit" else ()
    dropped, notes = _silent_condition(ours) if layout == "flux" else ({}, ())
    rules = Rules(layout, dropped, {}, steps)
    arrived, refused = arrive(ours.headers, rules)
    if refused:
        raise OfficialError(f"{ours.path}: {refused[0].name} cannot be exported: {refused[0].how}")
    notes += tuple(step.how for step in steps)
    return Export(ours, rules, arrived, notes, _diffusers_config(card) if layout == "diffusers" else {})


def _mmdit_steps(config: Mapping[str, Any], layout: Layout) -> tuple[Step, ...]:
    """FLUX.1 is fused with rotary pairs side by side, Open-Sora 2.0 is split with rotary halves."""
    from ml.models import mmdit_layouts

    width, heads, steps = int(config["hidden_size"]), int(config["num_heads"]), []
    if layout == "flux" and config["use_liger_rope"]:
        how = "rotary halves to pairs d, d+1"
        steps.append(Step(how, lambda state: mmdit_layouts.to_interleaved(state, heads)))
    if layout == "opensora" and not config["use_liger_rope"]:
        how = "rotary pairs d, d+1 to halves"
        steps.append(Step(how, lambda state: mmdit_layouts.to_half_split(state, heads)))
    if layout == "flux" and not config["fused_qkv"]:
        steps.append(Step("q, k and v (and the MLP) fused", lambda state: mmdit_layouts.fuse_qkv(state, width)))
    if layout == "opensora" and config["fused_qkv"]:
        steps.append(Step("q, k and v (and the MLP) split", lambda state: mmdit_layouts.split_qkv(state, width)))
    return tuple(steps)


def _silent_condition(ours: Official) -> tuple[dict[str, str], tuple[str, ...]]:
    """FLUX.1 has no condition: an untrained one (all zeros) is left out, a trained one goes along."""
    names = [name for name in ours.headers if name.startswith("cond_in.")]
    if not names:
        return {}, ()
    if any(bool(ours.read(name).any()) for name in names):
        return {}, ("cond_in was trained and is kept: FLUX.1's own code will call it unexpected",)
    return dict.fromkeys(names, "all zeros"), ("cond_in is all zeros and is left out",)


def _diffusers_config(card: Card) -> dict[str, Any]:
    """`config.json` for diffusers' `from_pretrained`; what it does not say is its class's default."""
    name, down, up = DIFFUSERS[card.kind]
    widths = list(card.config["block_out_channels"])
    known = {key: card.config[key] for key in ("latent_channels", "layers_per_block", "norm_num_groups")}
    latent = card.latent or {"scale": 1.0}
    blocks = {"down_block_types": [down] * len(widths), "up_block_types": [up] * len(widths)}
    return {"_class_name": name, "block_out_channels": widths, **blocks, **known, "scaling_factor": latent["scale"]}
