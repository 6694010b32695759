"""HunyuanVideo's autoencoder: released names and size, causality, normalised latents, tiles, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ml.architectures import HunyuanNet, Latent
from ml.models.autoencoders.hunyuan import HunyuanAutoencoder

TINY = HunyuanNet(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=1)
IN_TIME = TINY.model_copy(update={"use_temporal_tiling": True})


@pytest.fixture
def autoencoder() -> HunyuanAutoencoder:
    return _random()


def _random(net: HunyuanNet = TINY, latent: Latent | None = None) -> HunyuanAutoencoder:
    torch.manual_seed(0)
    return HunyuanAutoencoder(net, latent).eval()


def _published() -> dict[str, tuple[int, ...]]:
    """Every name and shape of `hunyuan_vae.safetensors`, from the fact sheet: widths 128 256 512 512, 2 down, 3 up."""
    weights = _side("encoder", "down", (128, 256, 512, 512), 2) | _side("decoder", "up", (512, 512, 256, 128), 3)
    weights |= {"encoder.conv_in.conv": (128, 3, 3, 3, 3), "encoder.conv_out.conv": (32, 512, 3, 3, 3)}
    weights |= {"decoder.conv_in.conv": (512, 16, 3, 3, 3), "decoder.conv_out.conv": (3, 128, 3, 3, 3)}
    weights |= {"quant_conv": (32, 32, 1, 1, 1), "post_quant_conv": (16, 16, 1, 1, 1)}
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def _side(name: str, way: str, widths: tuple[int, ...], resnets: int) -> dict[str, tuple[int, ...]]:
    """Encoder (`down`) or decoder (`up`): middle, four blocks with three resamplings, last norm."""
    shapes = {f"{name}.conv_norm_out": widths[-1:], f"{name}.mid_block.attentions.0.group_norm": (512,)}
    shapes |= {f"{name}.mid_block.attentions.0.{p}": (512, 512) for p in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= _resnet(f"{name}.mid_block.resnets.0", 512, 512) | _resnet(f"{name}.mid_block.resnets.1", 512, 512)
    for i, after in enumerate(widths):
        block, before = f"{name}.{way}_blocks.{i}", widths[max(i - 1, 0)]
        for j in range(resnets):
            shapes |= _resnet(f"{block}.resnets.{j}", before if j == 0 else after, after)
        shapes |= {f"{block}.{way}samplers.0.conv.conv": (after, after, 3, 3, 3)} if i < 3 else {}
    return shapes


def _resnet(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.norm1": (before,), f"{name}.norm2": (after,)}
    shapes |= {f"{name}.conv1.conv": (after, before, 3, 3, 3), f"{name}.conv2.conv": (after, after, 3, 3, 3)}
    return shapes | ({f"{name}.conv_shortcut.conv": (after, before, 1, 1, 1)} if before != after else {})


def test_names_shapes_and_size_are_the_released_ones() -> None:
    with torch.device("meta"):
        built = HunyuanAutoencoder()
    assert {name: tuple(value.shape) for name, value in built.net.state_dict().items()} == _published()
    assert sum(parameter.numel() for parameter in built.parameters()) == 246_478_803


def test_released_weights_load_strictly(autoencoder: HunyuanAutoencoder) -> None:
    state = {name: torch.zeros_like(value) for name, value in autoencoder.net.state_dict().items()}
    autoencoder.net.load_state_dict(state, strict=True)
    state.pop("quant_conv.bias")
    with pytest.raises(RuntimeError, match=r"quant_conv\.bias"):
        autoencoder.net.load_state_dict(state, strict=True)


def test_strides_are_those_of_the_fact_sheet() -> None:
    with torch.device("meta"):
        net = HunyuanAutoencoder().net
    down = [block.downsamplers[0].conv.conv.stride for block in net.encoder.down_blocks[:3]]
    up = [block.upsamplers[0].upsample_factor for block in net.decoder.up_blocks[:3]]
    assert down == up == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert net.encoder.down_blocks[3].downsamplers is None


def test_a_config_and_its_fields_say_the_same() -> None:
    fields = HunyuanAutoencoder(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=1)
    assert fields.config == TINY
    assert fields.net.state_dict().keys() == HunyuanAutoencoder(TINY).net.state_dict().keys()
    with pytest.raises(ValueError, match="widths"):
        HunyuanAutoencoder(widths=(8, 8, 8, 8))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (17, 5), (33, 9)])
@torch.inference_mode()
def test_round_trips(autoencoder: HunyuanAutoencoder, frames: int, latents: int) -> None:
    video = torch.randn(1, 3, frames, 16, 24)
    latent = autoencoder.encode(video)
    assert latent.shape == (1, *autoencoder.latent_shape(frames, 16, 24)) == (1, 16, latents, 2, 3)
    assert autoencoder.decode(latent).shape == video.shape
    assert autoencoder.longest(latents) == frames


def test_129_frames_have_33_latents(autoencoder: HunyuanAutoencoder) -> None:
    assert autoencoder.latent_shape(129, 768, 768) == (16, 33, 96, 96)


@pytest.mark.parametrize(
    ("shape", "latents"), [((4, 16, 16), (1, 2, 2)), ((6, 12, 16), (2, 2, 2)), ((5, 16, 20), (2, 2, 3))]
)
@torch.inference_mode()
def test_videos_that_strides_do_not_divide_are_rounded_up(
    autoencoder: HunyuanAutoencoder, shape: tuple[int, int, int], latents: tuple[int, int, int]
) -> None:
    assert autoencoder.encode(torch.zeros(1, 3, *shape)).shape[2:] == latents
    assert autoencoder.latent_frames(shape[0]) == latents[0]


def test_what_cannot_be_is_refused(autoencoder: HunyuanAutoencoder) -> None:
    with pytest.raises(ValueError, match="cannot encode 0 frames"):
        autoencoder.encode(torch.zeros(1, 3, 0, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.latent_shape(5, 12, 16)
    with pytest.raises(ValueError, match="cannot decode 2 latents to 9 frames: they are 5"):
        autoencoder.rebuild(torch.zeros(1, 16, 2, 2, 2), 9)
    with pytest.raises(ValueError, match="cannot decode 0 latents"):
        autoencoder.longest(0)
    with pytest.raises(ValueError, match="multiples of 8"):
        HunyuanAutoencoder(TINY.model_copy(update={"sample_size": 100}))


@torch.inference_mode()
def test_causal_the_first_latents_know_the_first_frames_only() -> None:
    """Group norms are over all frames, so causality holds for convolutions, attention and pads: shown without norms."""
    net = _random().double()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    video = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64)
    changed = video.clone()
    changed[:, :, 5:] += 1
    before, after, picture = (net.posterior(v)[0] for v in (video, changed, video[:, :, :1]))
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], rtol=0, atol=1e-10)
    torch.testing.assert_close(before[:, :, :1], picture, rtol=0, atol=1e-10)
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-6)


@torch.inference_mode()
def test_latents_are_normalised_per_channel_and_decoding_undoes_it() -> None:
    mean, std = tuple(0.1 * i for i in range(16)), tuple(1 + 0.1 * i for i in range(16))
    autoencoder = _random(latent=Latent(scale=0.476986, mean=mean, std=std))
    video = torch.randn(1, 3, 5, 16, 16)
    raw = autoencoder.posterior(video)[0]
    for channel in (0, 7, 15):
        expected = (raw[:, channel] - mean[channel]) / std[channel] * 0.476986
        torch.testing.assert_close(autoencoder.encode(video)[:, channel], expected)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(video)), autoencoder.rebuild(raw, 5))


@torch.inference_mode()
def test_the_released_scale_holds_unless_a_latent_is_given(autoencoder: HunyuanAutoencoder) -> None:
    video = torch.randn(1, 3, 1, 16, 16)
    torch.testing.assert_close(autoencoder.encode(video), 0.476986 * autoencoder.posterior(video)[0])
    assert _random(latent=Latent()).latent.scale == 1.0


@torch.inference_mode()
def test_training_draws_from_the_posterior(autoencoder: HunyuanAutoencoder) -> None:
    video = torch.randn(1, 3, 1, 16, 16)
    first, again, other = (autoencoder(video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, other.video)
    assert first.mean.shape == first.logvar.shape == first.sample.shape == (1, 16, 1, 2, 2)
    assert first.inner is None


@torch.inference_mode()
def test_log_variances_are_clipped(autoencoder: HunyuanAutoencoder) -> None:
    autoencoder.net.quant_conv.bias[16:24], autoencoder.net.quant_conv.bias[24:] = -1000.0, 1000.0
    logvar = autoencoder.posterior(torch.zeros(1, 3, 1, 8, 8))[1].flatten()
    assert logvar.unique().tolist() == [-30, 20]


@torch.inference_mode()
def test_tiles_leave_inputs_that_fit_alone(autoencoder: HunyuanAutoencoder) -> None:
    videos = [torch.randn(1, 3, *shape) for shape in ((61, 8, 8), (1, 256, 16))]
    plain = [autoencoder.encode(video) for video in videos]
    shown = [autoencoder.decode(latent) for latent in plain]
    autoencoder.tile(True)
    assert all(torch.equal(autoencoder.encode(v), latent) for v, latent in zip(videos, plain, strict=True))
    assert all(torch.equal(autoencoder.decode(latent), v) for latent, v in zip(plain, shown, strict=True))


@pytest.mark.parametrize(("shape", "latents"), [((69, 8, 8), (18, 1, 1)), ((1, 16, 264), (1, 2, 33))])
@torch.inference_mode()
def test_larger_inputs_are_tiled(shape: tuple[int, int, int], latents: tuple[int, int, int]) -> None:
    """What tiles give is near the whole: a smooth video, so that norms of a tile are near those of all."""
    coarse = torch.randn(1, 3, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    video = F.interpolate(coarse, size=shape, mode="trilinear")
    autoencoder = _random(IN_TIME)
    autoencoder.initialise()
    plain = autoencoder.encode(video)
    autoencoder.tile(True)
    tiled = autoencoder.encode(video)
    assert tiled.shape == plain.shape == (1, 16, *latents)
    assert not torch.equal(tiled, plain)
    shown = autoencoder.decode(tiled)
    assert shown.shape == video.shape
    autoencoder.tile(False)
    assert _correlation(tiled[:, :3], plain[:, :3]) > 0.9
    assert _correlation(shown, autoencoder.decode(plain)) > 0.9


@torch.inference_mode()
def test_the_published_mode_cuts_space_only(autoencoder: HunyuanAutoencoder) -> None:
    """inference/256px.py and train/image.py of main: use_spatial_tiling, without use_temporal_tiling."""
    long, wide = torch.randn(1, 3, 69, 8, 8), torch.randn(1, 3, 1, 8, 264)
    plain = [autoencoder.encode(video) for video in (long, wide)]
    shown = autoencoder.decode(plain[0])
    autoencoder.tile(True)
    assert torch.equal(autoencoder.encode(long), plain[0])
    assert torch.equal(autoencoder.decode(plain[0]), shown)
    assert not torch.equal(autoencoder.encode(wide), plain[1])
    uncut = _random(TINY.model_copy(update={"use_spatial_tiling": False}))
    uncut.tile(True)
    assert torch.equal(uncut.encode(wide), plain[1])


@torch.inference_mode()
def test_tiles_have_the_given_sizes() -> None:
    """40 pixels in tiles of 32 that share half: the first 16 columns are those of the first tile alone."""
    autoencoder = _random(TINY.model_copy(update={"sample_size": 32, "tile_overlap_factor": 0.5}))
    video = torch.randn(1, 3, 1, 8, 40)
    first = autoencoder.posterior(video[..., :32])[0]
    autoencoder.tile(True)
    torch.testing.assert_close(autoencoder.posterior(video)[0][..., :2], first[..., :2])


@torch.inference_mode()
def test_a_tile_in_time_starts_at_the_frame_before_its_own() -> None:
    """97 frames are tiles of 65 and 49: latents 13 to 16 lead over, and 17 to 24 are those of frames 48 to 96."""
    autoencoder, video = _random(IN_TIME), torch.randn(1, 3, 97, 8, 8)
    autoencoder.tile(True)
    tiled = autoencoder.posterior(video)[0]
    autoencoder.tile(False)
    first, second = (autoencoder.posterior(part)[0] for part in (video[:, :, :65], video[:, :, 48:]))
    torch.testing.assert_close(tiled[:, :, :13], first[:, :, :13])
    for step in range(4):
        ramp = first[:, :, 13 + step] * (1 - step / 4) + second[:, :, 1 + step] * (step / 4)
        torch.testing.assert_close(tiled[:, :, 13 + step], ramp)
    torch.testing.assert_close(tiled[:, :, 17:], second[:, :, 5:])


def test_only_all_of_it_can_be_trained(autoencoder: HunyuanAutoencoder) -> None:
    autoencoder.requires_grad_(False)
    autoencoder.train_only("all")
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())
    with pytest.raises(ValueError, match="no part 'temporal'"):
        autoencoder.train_only("temporal")


def test_it_learns_to_reconstruct() -> None:
    """Thirty steps on four pictures with detail inside a latent cell: 0.52 of the first loss was measured."""
    autoencoder = _random()
    autoencoder.initialise()
    video = F.interpolate(torch.rand(4, 3, 1, 6, 8) * 2 - 1, size=(1, 24, 32), mode="trilinear")
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-4)
    losses = []
    for _ in range(30):
        loss = (autoencoder(video).video - video).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())
    assert losses[-1] < 0.7 * losses[0]


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
