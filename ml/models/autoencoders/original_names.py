"""The autoencoders' hyper-parameters under the names that Open-Sora's own classes and configurations give them.

`HunyuanAutoencoder(scale_factor=0.476986, act_fn="silu", use_slicing=False)` is read like the original's. Names that
only say how to run are taken without effect; of names whose value the house has built in, that value. Constructors
alone read them: the `net` section of a recipe has the house's names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ml.architectures import DCAENet, HunyuanNet, Latent, OpenSoraV12Net, OpenSoraV13Net, StableDiffusionNet
from ml.section import Section

N = TypeVar("N", bound=Section)
Options = Mapping[str, Any]

# Scale of HunyuanVideo's latents (AutoEncoder3DConfig, om/hunyuan_vae, main).
HUNYUAN_SCALE = 0.476986
# Mean and deviation of each channel of 1.3's latents, `normalization="video"` (om/vae_v1_3/constants.py, 1.3).
VIDEO = Latent(
    mean=(
        *(-0.19016949832439423, -0.04480062797665596, 0.020789705216884613, 0.01865335740149021),
        *(-0.011585569009184837, 0.0010865575168281794, 0.08378933370113373, 0.08902134001255035),
        *(0.00940945465117693, 0.08086848258972168, -0.07251627743244171, 0.05052144080400467),
        *(-0.0209724809974432, -0.1223079189658165, -0.003862356534227729, -0.023072388023138046),
    ),
    std=(
        *(0.9490776062011719, 0.9594117999076843, 0.9444302916526794, 0.9103284478187561),
        *(0.959351658821106, 0.8430351614952087, 0.8888124823570251, 0.9291136860847473),
        *(0.972594141960144, 0.8917953968048096, 0.8630853891372681, 0.8279891610145569),
        *(0.9114300012588501, 0.7922844886779785, 0.8991407155990601, 0.9473513960838318),
    ),
)
# Sections that the original nests; their names are written with a dot here.
NESTED = ("encoder", "decoder", "vae_2d", "vae_temporal")
RUN_TIME = (
    *("cache_dir", "local_files_only", "force_huggingface", "subfolder", "device_map", "torch_dtype", "dtype"),
    *("use_slicing", "is_training", "cal_loss", "resolution", "pretrained_source", "rename_keys"),
)
WEIGHTS = ("from_pretrained", "pretrained_path")
IMPORT_HINT = "a constructor reads no weights: bring them in with `opensora weights import`, and load its folder"
# Values of the video DC-AEs of 32x32 pixels that have two halvings in time (om/dc_ae/models/dc_ae.py, main).
DC_AES: dict[str, dict[str, Any]] = {
    "dc-ae-f32t4c64": {"latent_channels": 64},
    "dc-ae-f32t4c128": {"latent_channels": 128},
    "dc-ae-f32t4c256": {"latent_channels": 256, "scaling_factor": 0.46505},
}


class UnsupportedOptionError(ValueError):
    """An original hyper-parameter whose value the house's network does not have."""


@dataclass(frozen=True)
class Names:
    """Original names of one network: those the house calls otherwise, values that are built in, and the scaling's."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    latent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Read(Generic[N]):
    """What a constructor was told: its section, how latents are normalised (None = not said), and other options."""

    net: N
    latent: Latent | None
    frozen_2d: bool = False


def read(kind: type[N], net: N | None, hyper: Options) -> Read[N]:
    """The section of a network from `net` or from fields under the house's or the original's names, never both.

    Raises UnsupportedOptionError for values that the network does not have, and pydantic's ValidationError for unknown
    names.
    """
    if net is not None and hyper:
        raise UnsupportedOptionError(f"{', '.join(hyper)}: give a net or its fields by name, not both")
    names, given = NAMES[kind], dict(_flat(hyper))
    if kind is DCAENet and (named := given.pop("model_name", None)) is not None:
        _same("model_name", named, tuple(DC_AES), "a network of other sizes is given by its fields")
        given = {**DC_AES[named], **given}
    house: dict[str, Any] = {}
    latent = {name: given.pop(name) for name in names.latent if name in given}
    frozen = bool(given.pop("freeze_vae_2d", False)) if kind is OpenSoraV12Net else False
    for name, value in given.items():
        if name.split(".")[-1] in WEIGHTS:
            _same(name, value, (None,), IMPORT_HINT)
        elif name in names.fixed:
            hint = IMPORT_HINT if name == "from_scratch" else "no other value is built in; leave it out"
            _same(name, value, names.fixed[name], hint)
        elif name.split(".")[-1] not in RUN_TIME:
            called = names.renamed.get(name, name)
            if called in house and _plain(house[called]) != _plain(value):
                raise UnsupportedOptionError(
                    f"{name}={value!r}: {called} is already {house[called]!r}; they must agree"
                )
            house[called] = value
    section = kind(**house) if net is None else net
    return Read(section, LATENTS[kind](section, latent) if latent else None, frozen)


def _flat(options: Options) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if name == "depth_list":  # of both sides, as `width_list` is
            yield from ((f"{side}.{name}", value) for side in SIDES)
        elif name in NESTED and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        elif name != "scaling_factor" or value is not None:  # None leaves what it is without it
            yield name, value


def _same(name: str, value: Any, allowed: tuple[Any, ...], hint: str) -> None:
    if _plain(value) not in [_plain(each) for each in allowed]:
        raise UnsupportedOptionError(
            f"{name}={value!r} is not supported, only {' or '.join(map(repr, allowed))}: {hint}"
        )


def _plain(value: Any) -> Any:
    return tuple(_plain(each) for each in value) if isinstance(value, list | tuple) else value


def _shifted(net: Section, given: Options) -> Latent:
    """(z - shift_factor) x scale_factor."""
    values = {"scale_factor": HUNYUAN_SCALE, "shift_factor": 0.0, **given}
    shift = values["shift_factor"]
    return Latent(scale=values["scale_factor"], mean=(shift,) if shift else ())


def _divided(net: Section, given: Options) -> Latent:
    """z / scaling_factor."""
    return Latent(std=(given["scaling_factor"],))


def _multiplied(net: Section, given: Options) -> Latent:
    return Latent(scale=given["scaling_factor"])


def _per_channel(net: Section, given: Options) -> Latent:
    """(z - shift) / scale; 0 and 1 where one of them is left out, and a number counts for every channel."""
    values = {"shift": 0.0, "scale": 1.0, **given}
    channels = net.model_dump()["latent_channels"]
    shift, scale = (
        tuple(each) if isinstance(each, list | tuple) else (each,) * channels
        for each in (values["shift"], values["scale"])
    )
    return Latent(mean=shift, std=scale)


def _normalised(net: Section, given: Options) -> Latent:
    name = given["normalization"]
    _same("normalization", name, ("video", None), "statistics frame by frame are not built in; give a `latent`")
    return VIDEO if name == "video" else Latent()


def _both(renamed: Mapping[str, str], parts: tuple[str, ...]) -> dict[str, str]:
    """Names as they are, and those of every nested section."""
    return {**renamed, **{f"{part}.{name}": house for part in parts for name, house in renamed.items()}}


SILU, SIDES, VAE_TEMPORAL = ("silu", "swish"), ("encoder", "decoder"), ("vae_temporal",)
TEMPORAL = ("filters", "num_res_blocks", "channel_multipliers", "temporal_downsample", "num_groups")
BLOCKS = (*("ResBlock",) * 3, *("EViTS5_GLU",) * 3)

NAMES: dict[type[Section], Names] = {
    StableDiffusionNet: Names(
        fixed={"type": ("VideoAutoencoderKL",), "patch_size": ((1, 8, 8),)},
        latent=("scaling_factor",),
    ),
    OpenSoraV12Net: Names(
        renamed={
            "vae_2d.micro_batch_size": "micro_batch_size",
            **{f"vae_temporal.{name}": name for name in TEMPORAL},
            **_both(
                dict.fromkeys(("in_out_channels", "latent_embed_dim", "embed_dim"), "latent_channels"), VAE_TEMPORAL
            ),
        },
        fixed={
            "type": ("OpenSoraVAE_V1_2", "VideoAutoencoderPipeline"),
            "model_type": ("VideoAutoencoderPipeline",),
            "vae_2d.type": ("VideoAutoencoderKL",),
            "vae_2d.patch_size": ((1, 8, 8),),
            "vae_2d.scaling_factor": (0.18215,),
            "vae_temporal.type": ("VAE_Temporal_SD", "VAE_Temporal"),
            "vae_2d": (None,),
            "vae_temporal": (None,),
            "activation_fn": SILU,
            "vae_temporal.activation_fn": SILU,
        },
        latent=("shift", "scale"),
    ),
    OpenSoraV13Net: Names(
        renamed=_both(
            {
                **dict.fromkeys(("z_channels", "embed_dim"), "latent_channels"),
                **{name: name for name in ("ch", "ch_mult", "num_res_blocks", "num_groups", "micro_batch_size_2d")},
            },
            SIDES,
        ),
        fixed={
            "type": ("OpenSoraVAE_V1_3", "OpenSoraVAE_V1_3_Pipline"),
            "encoder.type": ("VideoEncoder",),
            "decoder.type": ("VideoDecoder",),
            "tiled_dim": (None,),
            "num_tiles": (None,),
            "down_sampling_layer": ((1, 2),),
            "encoder.down_sampling_layer": ((1, 2),),
            "temporal_up_layers": ((2, 3),),
            "decoder.temporal_up_layers": ((2, 3),),
            **{
                f"{part}{name}": values
                for part in ("", "encoder.", "decoder.")
                for name, values in {
                    "in_channels": (3,),
                    "out_ch": (3,),
                    "double_z": (True,),
                    "dropout": (0,),
                    "attn_resolutions": ((),),
                    "resamp_with_conv": (True,),
                    "give_pre_end": (False,),
                }.items()
            },
        },
        latent=("normalization",),
    ),
    HunyuanNet: Names(
        fixed={
            "type": ("hunyuan_vae",),
            "act_fn": SILU,
            "in_channels": (3,),
            "out_channels": (3,),
            "time_compression_ratio": (4,),
            "spatial_compression_ratio": (8,),
            "mid_block_add_attention": (True,),
            "dropout": (0,),
            "channel": (False,),
        },
        latent=("scale_factor", "shift_factor"),
    ),
    DCAENet: Names(
        renamed={
            **_both({"latent_channels": "latent_channels", "width_list": "widths"}, SIDES),
            "encoder.depth_list": "encoder_depths",
            "decoder.depth_list": "decoder_depths",
            "encoder.temporal_downsample": "temporal_downsample",
            "decoder.temporal_upsample": "temporal_downsample",
        },
        fixed={
            "type": ("dc_ae",),
            "from_scratch": (True,),
            "time_compression_ratio": (4,),
            "spatial_compression_ratio": (32,),
            "use_quant_conv": (False,),
            "is_image_model": (False,),
            "train_decoder_only": (False,),
            "tune_channel_proj": (False,),
            **{
                f"{part}{name}": values
                for part in ("", "encoder.", "decoder.")
                for name, values in {
                    "in_channels": (3,),
                    "block_type": (BLOCKS,),
                    "norm": ("rms3d",),
                    "act": ("silu",),
                    "is_video": (True,),
                    "tune_channel_proj": (False,),
                }.items()
            },
            "encoder.downsample_block_type": ("Conv",),
            "encoder.downsample_match_channel": (True,),
            "encoder.downsample_shortcut": ("averaging",),
            "encoder.out_norm": (None,),
            "encoder.out_act": (None,),
            "encoder.out_shortcut": ("averaging",),
            "encoder.double_latent": (False,),
            "decoder.in_shortcut": ("duplicating",),
            "decoder.upsample_block_type": ("InterpolateConv",),
            "decoder.upsample_match_channel": (True,),
            "decoder.upsample_shortcut": ("duplicating",),
            "decoder.out_norm": ("rms3d",),
            "decoder.out_act": ("relu",),
        },
        latent=("scaling_factor",),
    ),
}
LATENTS: dict[type[Section], Callable[[Section, Options], Latent]] = {
    StableDiffusionNet: _multiplied,
    OpenSoraV12Net: _per_channel,
    OpenSoraV13Net: _normalised,
    HunyuanNet: _shifted,
    DCAENet: _divided,
}
