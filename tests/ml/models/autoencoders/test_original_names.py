"""Hyper-parameters under the original's names: what is read, what is built in, and what is refused."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ml.architectures import DCAENet, HunyuanNet, Latent, OpenSoraV12Net, OpenSoraV13Net, StableDiffusionNet
from ml.models.autoencoders.hunyuan import HunyuanAutoencoder
from ml.models.autoencoders.opensora_v1_2 import OpenSoraV12Autoencoder
from ml.models.autoencoders.original_names import NAMES, VIDEO, UnsupportedOptionError, read

# The arguments of the original classes and builders, with values of published configurations.
PUBLISHED: list[tuple[Any, dict[str, Any]]] = [
    (
        StableDiffusionNet,
        {"type": "VideoAutoencoderKL", "micro_batch_size": 4, "cache_dir": None, "local_files_only": False},
    ),
    (
        OpenSoraV12Net,
        {
            "type": "OpenSoraVAE_V1_2",
            "micro_frame_size": 17,
            "micro_batch_size": 4,
            "from_pretrained": None,
            "cal_loss": False,
            "force_huggingface": True,
            "vae_2d": {"type": "VideoAutoencoderKL", "subfolder": "vae", "micro_batch_size": 4},
            "vae_temporal": {"type": "VAE_Temporal_SD", "embed_dim": 4, "activation_fn": "swish", "filters": 128},
        },
    ),
    (
        OpenSoraV13Net,
        {
            "type": "OpenSoraVAE_V1_3",
            "z_channels": 16,
            "normalization": "video",
            "temporal_overlap": True,
            "num_tiles": None,
            "encoder": {"type": "VideoEncoder", "double_z": True, "out_ch": 3, "ch_mult": [1, 2, 4, 4]},
            "dtype": "bf16",
        },
    ),
    (
        HunyuanNet,
        {
            "type": "hunyuan_vae",
            "from_pretrained": None,
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
            "time_compression_ratio": 4,
            "spatial_compression_ratio": 8,
            "mid_block_add_attention": True,
            "sample_size": 256,
            "sample_tsize": 64,
            "use_slicing": False,
            "use_spatial_tiling": True,
            "use_temporal_tiling": False,
            "tile_overlap_factor": 0.25,
            "dropout": 0.0,
            "channel": False,
        },
    ),
    (
        DCAENet,
        {
            "type": "dc_ae",
            "model_name": "dc-ae-f32t4c128",
            "from_scratch": True,
            "scaling_factor": None,
            "use_spatial_tiling": True,
            "use_temporal_tiling": True,
            "spatial_tile_size": 256,
            "temporal_tile_size": 32,
            "is_training": False,
            "encoder": {"width_list": [128, 256, 512, 512, 1024, 1024], "depth_list": [2, 2, 2, 3, 3, 3]},
            "decoder": {"temporal_upsample": [False, False, False, True, True, False], "out_act": "relu"},
        },
    ),
]


@pytest.mark.parametrize(("kind", "hyper"), PUBLISHED, ids=[kind.__name__ for kind, _ in PUBLISHED])
def test_published_values_are_the_house_s_defaults(kind: Any, hyper: dict[str, Any]) -> None:
    found = read(kind, None, hyper).net.model_dump(exclude={"micro_batch_size"})
    assert found == kind().model_dump(exclude={"micro_batch_size"})


@pytest.mark.parametrize(
    ("kind", "hyper", "latent"),
    [
        (HunyuanNet, {"scale_factor": 0.5}, Latent(scale=0.5)),
        (HunyuanNet, {"shift_factor": 0.1}, Latent(scale=0.476986, mean=(0.1,))),
        (DCAENet, {"scaling_factor": 0.493}, Latent(std=(0.493,))),
        (DCAENet, {"model_name": "dc-ae-f32t4c256"}, Latent(std=(0.46505,))),
        (StableDiffusionNet, {"scaling_factor": 0.13025}, Latent(scale=0.13025)),
        (OpenSoraV12Net, {"shift": [1, 2, 3, 4], "scale": 2.0}, Latent(mean=(1, 2, 3, 4), std=(2, 2, 2, 2))),
        (OpenSoraV13Net, {"normalization": "video"}, VIDEO),
        (OpenSoraV13Net, {"normalization": None}, Latent()),
        (HunyuanNet, {"layers_per_block": 1}, None),
    ],
)
def test_scaling_is_read_as_a_latent(kind: Any, hyper: dict[str, Any], latent: Latent | None) -> None:
    assert read(kind, None, hyper).latent == latent


@torch.inference_mode()
def test_a_shift_is_taken_away_before_the_scale() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 1}
    autoencoder = HunyuanAutoencoder(**sizes, scale_factor=0.5, shift_factor=0.1).eval()
    video = torch.randn(1, 3, 1, 16, 16)
    torch.testing.assert_close(autoencoder.encode(video), 0.5 * (autoencoder.posterior(video)[0] - 0.1))


def test_renamed_fields_size_the_network() -> None:
    assert read(OpenSoraV13Net, None, {"z_channels": 4}).net.latent_channels == 4
    assert read(DCAENet, None, {"model_name": "dc-ae-f32t4c64"}).net.latent_channels == 64
    net = read(DCAENet, None, {"depth_list": (1,) * 6, "width_list": (128,) * 6}).net
    assert (net.encoder_depths, net.decoder_depths, net.widths) == ((1,) * 6, (1,) * 6, (128,) * 6)


def test_a_frozen_2d_part_leaves_the_temporal_one_to_train() -> None:
    with torch.device("meta"):
        part = OpenSoraV12Autoencoder(freeze_vae_2d=True).net
    assert not any(parameter.requires_grad for parameter in part.spatial_vae.parameters())
    assert all(parameter.requires_grad for parameter in part.temporal_vae.parameters())


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        (HunyuanNet, {"act_fn": "relu"}, "act_fn='relu' is not supported, only 'silu' or 'swish'"),
        (HunyuanNet, {"from_pretrained": "x.safetensors"}, "opensora weights import"),
        (OpenSoraV12Net, {"vae_2d": {"from_pretrained": "x"}}, "opensora weights import"),
        (OpenSoraV12Net, {"in_out_channels": 4, "embed_dim": 8}, "embed_dim=8: latent_channels is already 4"),
        (OpenSoraV13Net, {"normalization": "video_5frames"}, "give a `latent`"),
        (DCAENet, {"model_name": "dc-ae-f64t4c128"}, "given by its fields"),
        (DCAENet, {"from_scratch": False}, "opensora weights import"),
        (DCAENet, {"decoder": {"norm": "bn2d"}}, "decoder.norm='bn2d'"),
    ],
)
def test_what_is_not_built_in_is_refused_with_a_hint(kind: Any, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedOptionError) as refused:
        read(kind, None, hyper)
    assert message in str(refused.value)


def test_a_net_and_fields_beside_it_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="scale_factor: give a net or its fields"):
        HunyuanAutoencoder(HunyuanNet(), scale_factor=1.0)


@pytest.mark.parametrize("kind", NAMES)
def test_unknown_names_are_refused_and_sections_take_the_house_s_only(kind: Any) -> None:
    with pytest.raises(ValidationError, match="chanels"):
        read(kind, None, {"chanels": 3})
    with pytest.raises(ValidationError, match="type"):
        kind(type="x")
