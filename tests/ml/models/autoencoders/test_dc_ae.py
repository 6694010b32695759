import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ml.architectures import DCAENet, Latent
from ml.models.autoencoders.dc_ae import DCAutoencoder

WIDTHS = (128, 256, 512, 512, 1024, 1024)
TINY = DCAENet(
    latent_channels=32,
    widths=(8, 16, 16, 32, 32, 32),
    encoder_depths=(1,) * 6,
    decoder_depths=(1,) * 6,
    attention_head_dim=8,
)


def tiny(seed: int = 0, net: DCAENet = TINY) -> DCAutoencoder:
    torch.manual_seed(seed)
    autoencoder = DCAutoencoder(net)
    autoencoder.initialise()
    return autoencoder.eval()


def smooth(frames: int, height: int, width: int, seed: int = 3) -> Tensor:
    """A video of slow colour gradients."""
    coarse = torch.rand(1, 3, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return F.interpolate(coarse, size=(frames, height, width), mode="trilinear")


def psnr(one: Tensor, other: Tensor) -> float:
    return 10 * math.log10(4 / float((one - other).square().mean()))


# --- names, from the patterns of the reference (opensora.md 1.7) ------------------------------------------------------


def conv(name: str, out: int, into: int, taps: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, into, taps, taps, taps)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, stage: int) -> dict[str, tuple[int, ...]]:
    width = WIDTHS[stage]
    if stage < 3:
        first, second = f"{name}.main.conv1", f"{name}.main.conv2"
        return conv(f"{first}.conv", width, width, 3) | {
            **conv(f"{second}.conv", width, width, 3, bias=False),
            **norm(f"{second}.norm", width),
        }
    context, local = f"{name}.context_module.main", f"{name}.local_module.main"
    return {
        **conv(f"{context}.qkv.conv", 3 * width, width, 1, bias=False),
        **conv(f"{context}.aggreg.0.0", 3 * width, 1, 5, bias=False),
        **conv(f"{context}.aggreg.0.1", 3 * width, 32, 1, bias=False),
        **conv(f"{context}.proj.conv", width, 2 * width, 1, bias=False),
        **norm(f"{context}.proj.norm", width),
        **conv(f"{local}.inverted_conv.conv", 8 * width, width, 1),
        **conv(f"{local}.depth_conv.conv", 8 * width, 1, 3),
        **conv(f"{local}.point_conv.conv", width, 4 * width, 1, bias=False),
        **norm(f"{local}.point_conv.norm", width),
    }


def released() -> dict[str, tuple[int, ...]]:
    names = conv("encoder.project_in.conv", 128, 3, 3)
    for stage, depth in enumerate((2, 2, 2, 3, 3, 3)):
        place = f"encoder.stages.{stage}.op_list"
        for index in range(depth):
            names |= block(f"{place}.{index}", stage)
        if stage < 5:
            names |= conv(f"{place}.{depth}.main.conv", WIDTHS[stage + 1], WIDTHS[stage], 3)
    names |= conv("encoder.project_out.main.op_list.0.conv", 128, 1024, 3)
    names |= conv("decoder.project_in.main.conv", 1024, 128, 3)
    for stage in range(6):
        place, first = f"decoder.stages.{stage}.op_list", 0
        if stage < 5:
            names |= conv(f"{place}.0.main.conv.conv", WIDTHS[stage], WIDTHS[stage + 1], 3)
            first = 1
        for index in range(3):
            names |= block(f"{place}.{first + index}", stage)
    return names | norm("decoder.project_out.op_list.0", 128) | conv("decoder.project_out.op_list.2.conv", 3, 128, 3)


def test_the_paper_size_has_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        net = DCAutoencoder().net
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == released()
    assert sum(p.numel() for p in net.parameters()) == 459_462_147


def test_weights_load_strictly(tmp_path: Path) -> None:
    one, other = tiny(0), tiny(1)
    save_file(one.net.state_dict(), tmp_path / "dc_ae.safetensors")
    state = load_file(tmp_path / "dc_ae.safetensors")
    other.net.load_state_dict(state, strict=True)
    video = smooth(4, 32, 64)
    with torch.no_grad():
        assert torch.equal(one.encode(video), other.encode(video))
    state["encoder.project_in.conv.scale"] = state.pop("encoder.project_in.conv.bias")
    with pytest.raises(RuntimeError, match="project_in"):
        other.net.load_state_dict(state, strict=True)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (4, 1), (8, 2), (32, 8)])
def test_round_trips_keep_the_length(frames: int, latent: int) -> None:
    autoencoder = tiny()
    video = smooth(frames, 32, 64)
    with torch.no_grad():
        z = autoencoder.encode(video)
        assert z.shape == (1, *autoencoder.latent_shape(frames, 32, 64)) == (1, 32, latent, 1, 2)
        assert autoencoder.decode(z, frames).shape == video.shape
        passed = autoencoder(video)
    assert passed.logvar is None
    assert torch.equal(passed.sample, passed.mean)
    torch.testing.assert_close(passed.video, autoencoder.decode(z, frames).detach())


def test_a_latent_of_one_frame_is_a_picture_or_a_clip_of_four() -> None:
    autoencoder = tiny()
    with torch.no_grad():
        z = autoencoder.encode(smooth(1, 32, 32))
        assert autoencoder.decode(z, 1).shape[2] == autoencoder.decode(z).shape[2] == 1
        assert autoencoder.decode(z, 4).shape[2] == autoencoder.longest(1) == 4
        assert autoencoder.decode(z.repeat(1, 1, 3, 1, 1)).shape[2] == 12
        assert autoencoder.encode(smooth(2, 32, 32)).shape[2] == 1
    with pytest.raises(ValueError, match="cannot decode 2 frames"):
        autoencoder.rebuild(z, 2)
    with pytest.raises(ValueError, match="8 frames have 2 latent frames, not 1"):
        autoencoder.rebuild(z, 8)


@pytest.mark.parametrize(("frames", "nearest"), [(3, "1 or 4"), (6, "4 or 8"), (129, "128 or 132"), (0, "1 or 4")])
def test_other_lengths_are_refused_with_the_nearest(frames: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot encode {frames} frames.*{nearest}"):
        tiny().latent_frames(frames)


def test_sizes_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        tiny().encode(torch.zeros(1, 3, 4, 32, 48))


def test_latents_are_normalised_on_the_way() -> None:
    autoencoder = tiny()
    video = smooth(4, 32, 32)
    with torch.no_grad():
        raw, rebuilt = autoencoder.encode(video), autoencoder(video).video
        autoencoder.latent = Latent(std=(0.493,))
        torch.testing.assert_close(autoencoder.encode(video), raw / 0.493)
        torch.testing.assert_close(autoencoder.decode(raw / 0.493, 4), rebuilt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 32, 288), (36, 32, 32)], ids=["space", "time"])
def test_tiles_change_little_and_only_where_they_are_needed(shape: tuple[int, int, int]) -> None:
    """A fresh network is carried by its shortcuts, which see no further than their cell: seams barely show."""
    autoencoder = tiny()
    small, large = smooth(4, 32, 64), smooth(*shape)
    with torch.no_grad():
        plain = [autoencoder.encode(small), autoencoder.encode(large)]
        rebuilt = autoencoder.decode(plain[1], shape[0])
        autoencoder.tile(True)
        assert torch.equal(autoencoder.encode(small), plain[0])
        z = autoencoder.encode(large)
        assert z.shape == plain[1].shape
        assert not torch.equal(z, plain[1])
        assert float((z - plain[1]).abs().mean()) < 0.05 * float(plain[1].abs().mean())
        assert psnr(autoencoder.decode(plain[1], shape[0]), rebuilt) > 40


def test_only_the_axes_that_are_named_are_cut() -> None:
    wide, long = smooth(1, 32, 288), smooth(36, 32, 32)
    with torch.no_grad():
        plain = [tiny().encode(video) for video in (wide, long)]
        for field, cut in (("use_temporal_tiling", wide), ("use_spatial_tiling", long)):
            autoencoder = tiny(net=TINY.model_copy(update={field: False}))
            autoencoder.tile(True)
            for video, whole in zip((wide, long), plain, strict=True):
                assert torch.equal(autoencoder.encode(video), whole) == (video is not cut)


def test_a_last_tile_of_one_latent_frame_still_gives_four_frames() -> None:
    autoencoder = tiny()
    autoencoder.tile(True)
    with torch.no_grad():
        assert autoencoder.decode(torch.zeros(1, 32, 13, 1, 1), 52).shape[2] == 52


def test_a_fresh_network_gives_the_mean_colour_of_each_cell() -> None:
    video = smooth(8, 96, 128)
    blurred = F.interpolate(F.avg_pool3d(video, (4, 32, 32)), size=video.shape[2:])
    with torch.no_grad():
        rebuilt = tiny()(video).video
    assert psnr(rebuilt, blurred) > 22
    assert psnr(rebuilt, video) > psnr(video.mean() * torch.ones_like(video), video) + 3


def test_training_improves_on_the_start_without_a_posterior() -> None:
    autoencoder = tiny().train()
    autoencoder.train_only("all")
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-4)
    losses = []
    for _ in range(25):
        video = smooth(4, 32, 32)
        loss = (autoencoder(video).video - video).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="has one part"):
        autoencoder.train_only("temporal")


@pytest.mark.parametrize(
    ("hyper", "match"),
    [
        ({"widths": (8, 64, 64, 64, 64, 64)}, "8 and 64"),
        ({"latent_channels": 48}, "latent_channels 48"),
        ({"attention_head_dim": 48}, "attention_head_dim 48"),
        ({"temporal_downsample": (True, True, True, False, False, False)}, "two of the first five"),
    ],
)
def test_sizes_that_the_shortcuts_cannot_carry_are_refused(hyper: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        DCAENet.model_validate(hyper)
