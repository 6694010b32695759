"""Hyper-parameters: released defaults, what they imply, and what cannot be built."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ml.architectures import (
    AutoencoderNet,
    DCAENet,
    HunyuanNet,
    HyperParameterError,
    Latent,
    MMDiT,
    Model,
    OpenSoraV12Net,
    OpenSoraV13Net,
    StableDiffusionNet,
    STDiT,
    STDiT2,
    STDiT3,
    hyper_of,
)

MODELS: TypeAdapter[Model] = TypeAdapter(Model)
NETS: TypeAdapter[AutoencoderNet] = TypeAdapter(AutoencoderNet)


def test_the_defaults_of_stdit_are_xl_2() -> None:
    """STDiT-XL/2 of 1.0 to 1.3: 28 blocks, 1152 wide, 16 heads, tokens of 2 x 2 cells, a variance beside the output."""
    for made in (STDiT(), STDiT2(), STDiT3()):
        assert (made.depth, made.hidden_size, made.num_heads, made.patch) == (28, 1152, 16, 2)
        assert (made.in_channels, made.out_channels) == (4, 8)
        assert made.mlp_ratio == 4.0
    assert [made.model_max_length for made in (STDiT(), STDiT2(), STDiT3())] == [120, 120, 300]
    assert STDiT3(in_channels=16, pred_sigma=False).out_channels == 16
    assert STDiT().input_size == (1, 32, 32)
    assert (STDiT2().input_sq_size, STDiT2().qk_norm, STDiT3().input_sq_size, STDiT3().qk_norm) == (
        32,
        False,
        512,
        True,
    )


def test_the_defaults_of_mmdit_are_the_original_s_eleven_billion() -> None:
    """MMDiTConfig of om/mmdit/model.py, main: a fused network without a condition; recipes state the released one."""
    made = MMDiT()
    assert (made.cond_embed, made.fused_qkv, made.use_liger_rope, made.guidance_embed) == (False, True, False, False)
    assert (made.depth, made.depth_single_blocks, made.hidden_size, made.num_heads) == (19, 38, 3072, 24)
    assert sum(made.axes_dim) == made.hidden_size // made.num_heads == 128
    assert made.in_channels == 16 * made.patch**2


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (STDiT(), "none"),
        (STDiT2(), "mask"),
        (STDiT3(), "mask"),
        (STDiT3(kernel_size=(8, 8, -1)), "embed"),
        (STDiT3(cond_embed=True), "embed"),
        (STDiT3(kernel_size=(8, 8, -1), cond_embed=False), "mask"),
        (MMDiT(cond_embed=True), "channels"),
        (MMDiT(), "none"),
    ],
)
def test_how_a_network_is_told_of_given_frames_is_its_generation(made: Any, wanted: str) -> None:
    assert made.conditioning == wanted


@pytest.mark.parametrize(
    ("section", "fields", "problem"),
    [
        (STDiT3, {"use_spatial_rope": True}, "give kernel_size too"),
        (STDiT3, {"kernel_size": (8, 8, -1), "qk_norm_legacy": True}, "never windowed"),
        (STDiT3, {"only_train_temporal": True, "skip_temporal": True}, "leaves nothing to train"),
        (STDiT, {"patch_size": (0, 2, 2)}, "patch_size"),
        (MMDiT, {"num_heads": 7}, "num_heads 7 must divide hidden_size 3072"),
        (MMDiT, {"axes_dim": (16, 56, 57)}, "must be even and add up to the head size 128"),
        (MMDiT, {"axes_dim": (15, 57, 56)}, "must be even"),
        (DCAENet, {"widths": (128, 256, 512, 512, 1024, 1000)}, "each must divide 4 x the other"),
        (DCAENet, {"latent_channels": 96}, "latent_channels 96 must divide the last width 1024"),
        (DCAENet, {"attention_head_dim": 48}, "must divide the attention widths"),
        (DCAENet, {"temporal_downsample": (False, False, False, False, True, False)}, "two of the first five stages"),
        (DCAENet, {"temporal_downsample": (False, False, True, False, False, True)}, "two of the first five stages"),
        (StableDiffusionNet, {"block_out_channels": (128, 256)}, "at least 4"),
        (OpenSoraV13Net, {"ch_mult": (1, 2, 4)}, "at least 4"),
        (Latent, {"std": (1.0, 0.0)}, "greater than 0"),
    ],
)
def test_what_cannot_be_built_is_refused(section: Any, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        section(**fields)


def test_every_kind_is_chosen_by_its_name() -> None:
    for section in (STDiT(), STDiT2(), STDiT3(), MMDiT()):
        assert MODELS.validate_python(section.model_dump()) == section
    for net in (StableDiffusionNet(), OpenSoraV12Net(), OpenSoraV13Net(), HunyuanNet(), DCAENet()):
        assert NETS.validate_python(net.model_dump()) == net
        assert NETS.validate_json(net.model_dump_json()) == net
    with pytest.raises(ValidationError, match="does not match any"):
        MODELS.validate_python({"kind": "dit"})


def test_constructors_take_what_builders_and_published_files_pass_along_and_recipes_do_not() -> None:
    published = {"architectures": ["STDiT3"], "model_type": "STDiT3", "torch_dtype": "float32", "qk_norm": True}
    built = {"type": "STDiT3-XL/2", "from_pretrained": None, "force_huggingface": True, "enable_flashattn": True}
    for passed in (published, built):
        assert hyper_of(STDiT3, {**passed, "depth": 2}) == STDiT3(depth=2)
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            MODELS.validate_python({"kind": "stdit3", **passed})
    with pytest.raises(ValidationError, match="widht"):
        hyper_of(STDiT3, {"widht": 3})
    assert hyper_of(STDiT3, {"type": "STDiT3-3B/2"}) == STDiT3(hidden_size=1872, num_heads=26)
    assert hyper_of(STDiT3, {"adapt_16ch": True, "skip_temporal": True}).embeds_condition
    assert not hyper_of(STDiT3, {"adapt_16ch": False}).embeds_condition


def test_a_constructor_asked_for_weights_says_how_to_get_them() -> None:
    with pytest.raises(HyperParameterError, match=r"from_pretrained='x.pt'.*opensora weights import"):
        hyper_of(MMDiT, {"from_pretrained": "x.pt"})


def test_latents_have_the_released_channels() -> None:
    nets = (StableDiffusionNet(), OpenSoraV12Net(), OpenSoraV13Net(), HunyuanNet(), DCAENet())
    assert [net.latent_channels for net in nets] == [4, 4, 16, 16, 128]
    assert Latent() == Latent(scale=1.0, mean=(), std=())


@pytest.mark.parametrize(
    "module", ["section", "architectures", "processes", "reconstruction", "aspects", "shapes", "sections", "recipe"]
)
def test_describing_a_system_loads_no_torch(module: str) -> None:
    code = f"import sys, ml.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
