"""OpenSora-VAE 1.3: released names and size, windows and their latents, causality, memory options, tiles, learning."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ml.architectures import Latent, OpenSoraV13Net
from ml.models.autoencoders.opensora_v1_3 import OpenSoraV13Autoencoder

TINY = OpenSoraV13Net(ch=8, num_res_blocks=1, num_groups=1)


@pytest.fixture
def autoencoder() -> OpenSoraV13Autoencoder:
    return _random()


def _random(net: OpenSoraV13Net = TINY, latent: Latent | None = None) -> OpenSoraV13Autoencoder:
    torch.manual_seed(0)
    return OpenSoraV13Autoencoder(net, latent).eval()


def _variant(**changes: object) -> OpenSoraV13Net:
    return OpenSoraV13Net.model_validate({**TINY.model_dump(), **changes})


def _published() -> dict[str, tuple[int, ...]]:
    """Every name and shape of the released file, from the fact sheet: widths 128 256 512 512, 2 blocks down, 3 up."""
    widths, shapes = (128, 256, 512, 512), dict[str, tuple[int, ...]]()
    for level, width in enumerate(widths):
        below, above = widths[max(level - 1, 0)], widths[min(level + 1, 3)]
        for j in range(2):
            shapes |= _block(f"encoder.down.{level}.block.{j}", width if j else below, width)
        for j in range(3):
            shapes |= _block(f"decoder.up.{level}.block.{j}", width if j else above, width)
    shapes |= {"encoder.down.0.downsample.conv": (128, 128, 3, 3), "decoder.up.1.upsample.conv": (256, 256, 3, 3)}
    shapes |= {f"encoder.down.{i}.downsample.conv.conv": (widths[i], widths[i], 3, 3, 3) for i in (1, 2)}
    for i in (2, 3):
        shapes |= {f"decoder.up.{i}.upsample.conv3d.norm{n}": (512,) for n in (1, 2)}
        shapes |= {f"decoder.up.{i}.upsample.conv3d.conv{n}.conv": (512, 512, 3, 3, 3) for n in (1, 2)}
    for side in ("encoder", "decoder"):
        shapes |= _block(f"{side}.mid.block_1", 512, 512) | _block(f"{side}.mid.block_2", 512, 512)
        shapes |= {f"{side}.mid.attn_1.norm": (512,)}
        shapes |= {f"{side}.mid.attn_1.{p}.conv": (512, 512, 1, 1, 1) for p in ("q", "k", "v", "proj_out")}
    shapes |= {"encoder.conv_in.conv": (128, 3, 3, 3, 3), "encoder.conv_out.conv": (32, 512, 3, 3, 3)}
    shapes |= {"decoder.conv_in.conv": (512, 16, 3, 3, 3), "decoder.conv_out": (3, 128, 3, 3, 3)}
    shapes |= {"encoder.norm_out": (512,), "decoder.norm_out": (128,)}
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()} | biases


def _block(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.norm1": (before,), f"{name}.norm2": (after,)}
    shapes |= {f"{name}.conv1.conv": (after, before, 3, 3, 3), f"{name}.conv2.conv": (after, after, 3, 3, 3)}
    return shapes | ({f"{name}.nin_shortcut.conv": (after, before, 1, 1, 1)} if before != after else {})


def test_names_shapes_and_size_are_the_released_ones() -> None:
    with torch.device("meta"):
        built = OpenSoraV13Autoencoder()
    assert {name: tuple(value.shape) for name, value in built.net.state_dict().items()} == _published()
    assert sum(parameter.numel() for parameter in built.parameters()) == 259_163_811


def test_norms_have_the_original_epsilons() -> None:
    with torch.device("meta"):
        net = OpenSoraV13Autoencoder().net
    norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.GroupNorm)}
    assert {norm.num_groups for norm in norms.values()} == {32}
    assert {norm.eps for name, norm in norms.items() if "conv3d" in name} == {1e-5}
    assert {norm.eps for name, norm in norms.items() if "conv3d" not in name} == {1e-6}


def test_released_weights_load_strictly(autoencoder: OpenSoraV13Autoencoder) -> None:
    state = {name: torch.zeros_like(value) for name, value in autoencoder.net.state_dict().items()}
    autoencoder.net.load_state_dict(state, strict=True)
    sliced = _random(_variant(use_tiled_conv3d=True))
    sliced.net.load_state_dict(state, strict=True)
    state.pop("decoder.conv_out.bias")
    with pytest.raises(RuntimeError, match=r"decoder\.conv_out\.bias"):
        autoencoder.net.load_state_dict(state, strict=True)


def test_a_config_and_its_fields_say_the_same() -> None:
    assert OpenSoraV13Autoencoder(ch=8, num_res_blocks=1, num_groups=1).config == TINY
    with pytest.raises(ValueError, match="z_channel"):
        OpenSoraV13Autoencoder(z_channel=4)
    with pytest.raises(ValueError, match="micro_frame_size 16"):
        OpenSoraV13Autoencoder(_variant(micro_frame_size=16))


LENGTHS = {1: 1, 5: 2, 9: 3, 13: 4, 17: 5, 21: 7, 33: 10, 49: 15, 65: 20, 81: 25, 97: 30, 113: 35}


@pytest.mark.parametrize(("frames", "latents"), LENGTHS.items())
def test_latent_lengths(autoencoder: OpenSoraV13Autoencoder, frames: int, latents: int) -> None:
    assert autoencoder.latent_frames(frames) == latents
    assert autoencoder.longest(latents) == frames
    assert autoencoder.latent_shape(frames, 360, 640) == (16, latents, 45, 80)


def test_windows_without_overlap_and_whole_clips_have_other_lengths() -> None:
    apart, whole = _random(_variant(temporal_overlap=False)), _random(_variant(micro_frame_size=None))
    assert [apart.latent_frames(n) for n in (1, 17, 18, 34, 51)] == [1, 5, 6, 10, 15]
    assert [whole.latent_frames(n) for n in (1, 17, 33, 113)] == [1, 5, 9, 29]
    assert [apart.latent_frames(n) for n in (16, 20, 33, 49)] == [4, 6, 9, 14]
    assert [apart.longest(n) for n in (1, 5, 6, 11)] == [1, 17, 18, 35]
    assert [whole.longest(n) for n in (1, 5, 6)] == [1, 17, 21]


@pytest.mark.parametrize(("frames", "latents", "shown"), [(16, 4, 13), (18, 6, 17), (20, 6, 17), (34, 11, 33)])
@torch.inference_mode()
def test_lengths_that_windows_do_not_fill_are_encoded_too(
    autoencoder: OpenSoraV13Autoencoder, frames: int, latents: int, shown: int
) -> None:
    """As in the original: a last window of n frames has (n+3)/4 latents, and those come back as 4k+1 frames."""
    latent = autoencoder.encode(torch.randn(1, 3, frames, 8, 8))
    assert latent.shape[2] == autoencoder.latent_frames(frames) == latents
    assert autoencoder.decode(latent).shape[2] == autoencoder.longest(latents) == shown


@pytest.mark.parametrize("frames", [1, 5, 17, 21, 33])
@torch.inference_mode()
def test_round_trips(autoencoder: OpenSoraV13Autoencoder, frames: int) -> None:
    video = torch.randn(1, 3, frames, 16, 24)
    latent = autoencoder.encode(video)
    assert latent.shape == (1, 16, LENGTHS[frames], 2, 3)
    assert autoencoder.decode(latent).shape == video.shape


@pytest.mark.parametrize("overlap", [True, False])
@torch.inference_mode()
def test_a_long_round_trip_at_the_published_size(overlap: bool) -> None:
    """On the meta device: 113 frames of 720p have 35 latents; 51 frames apart have 15."""
    frames, latents = (113, 35) if overlap else (51, 15)
    with torch.device("meta"):
        autoencoder = OpenSoraV13Autoencoder(temporal_overlap=overlap)
        latent = autoencoder.encode(torch.empty(1, 3, frames, 720, 1280))
        assert latent.shape == (1, 16, latents, 90, 160)
        assert autoencoder.decode(latent).shape == (1, 3, frames, 720, 1280)


@torch.inference_mode()
def test_a_plane_that_8_does_not_divide_is_rounded(autoencoder: OpenSoraV13Autoencoder) -> None:
    """The first halving rounds down, the two in space and time up: 20 is 10, 5, 3 and 13 is 6, 3, 2."""
    assert autoencoder.encode(torch.zeros(1, 3, 5, 20, 13)).shape == (1, 16, 2, 3, 2)


def test_what_cannot_be_is_refused(autoencoder: OpenSoraV13Autoencoder) -> None:
    for shape in ((0, 16, 16), (5, 1, 16)):
        with pytest.raises(ValueError, match="cannot encode"):
            autoencoder.encode(torch.zeros(1, 3, *shape))
    with pytest.raises(ValueError, match="cannot decode 7 latents to 17 frames: they are 21"):
        autoencoder.rebuild(torch.zeros(1, 16, 7, 2, 2), 17)
    with pytest.raises(ValueError, match="cannot decode 0 latents"):
        autoencoder.longest(0)


@torch.inference_mode()
def test_windows_share_a_frame_whose_two_pictures_are_averaged(autoencoder: OpenSoraV13Autoencoder) -> None:
    video = torch.randn(1, 3, 33, 8, 8)
    first, second = (autoencoder.posterior(part)[0] for part in (video[:, :, :17], video[:, :, 16:]))
    mean, _ = autoencoder.posterior(video)
    torch.testing.assert_close(mean, torch.cat([first, second], dim=2))
    shown = autoencoder.rebuild(mean, 33)
    before, after = (autoencoder.rebuild(part, 17) for part in (first, second))
    torch.testing.assert_close(shown[:, :, :16], before[:, :, :16])
    torch.testing.assert_close(shown[:, :, 16], (before[:, :, 16] + after[:, :, 0]) / 2)
    torch.testing.assert_close(shown[:, :, 17:], after[:, :, 1:])


@torch.inference_mode()
def test_causal_the_first_latents_know_the_first_frames_only() -> None:
    """Group norms are over all frames, so causality holds for convolutions, attention and pads: shown without norms."""
    net = _random().double()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    video = torch.randn(1, 3, 17, 16, 16, dtype=torch.float64)
    changed = video.clone()
    changed[:, :, 9:] += 1
    before, after, picture = (net.posterior(v)[0] for v in (video, changed, video[:, :, :1]))
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], rtol=0, atol=1e-10)
    torch.testing.assert_close(before[:, :, :1], picture, rtol=0, atol=1e-10)
    assert not torch.allclose(before[:, :, 3], after[:, :, 3], atol=1e-6)
    shown, changed_shown = net.rebuild(before, 17), net.rebuild(after, 17)
    torch.testing.assert_close(shown[:, :, :9], changed_shown[:, :, :9], rtol=0, atol=1e-10)
    assert not torch.allclose(shown[:, :, 9], changed_shown[:, :, 9], atol=1e-6)


@torch.inference_mode()
def test_attention_is_causal_cell_by_cell(autoencoder: OpenSoraV13Autoencoder) -> None:
    """Closed form with equal keys: every cell gets the mean of the values of itself and the cells before it."""
    attention = autoencoder.net.encoder.mid.attn_1
    attention.norm = nn.Identity()
    for part in (attention.q, attention.k, attention.v, attention.proj_out):
        part.conv.bias.zero_()
        part.conv.weight.copy_(torch.eye(32)[:, :, None, None, None])
    attention.q.conv.weight.zero_()
    x = torch.randn(1, 32, 2, 3, 4)
    means = x.flatten(2).cumsum(-1) / torch.arange(1, 25)
    torch.testing.assert_close(attention(x), x + means.view_as(x))


@torch.inference_mode()
def test_memory_options_change_nothing(autoencoder: OpenSoraV13Autoencoder) -> None:
    options = {"use_tiled_conv3d": True, "tile_size": 4, "micro_batch_size": 1, "micro_batch_size_2d": 4}
    careful, video = _random(_variant(**options)), torch.randn(3, 3, 5, 24, 40)
    mean, logvar = autoencoder.posterior(video)
    careful_mean, careful_logvar = careful.posterior(video)
    torch.testing.assert_close(careful_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(careful_logvar, logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(careful.rebuild(mean, 5), autoencoder.rebuild(mean, 5), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_slices_bound_what_a_convolution_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    careful, sizes = _random(_variant(use_tiled_conv3d=True, tile_size=4)), list[int]()
    plain = nn.Conv3d.forward

    def watched(self: nn.Conv3d, x: Tensor) -> Tensor:
        sizes.extend([x.shape[4]] if self.stride == (1, 1, 1) else [])
        return plain(self, x)

    monkeypatch.setattr(nn.Conv3d, "forward", watched)
    careful.posterior(torch.randn(1, 3, 1, 8, 64))
    assert max(sizes) == 4 + 2


@torch.inference_mode()
def test_published_statistics_normalise_latents_per_channel() -> None:
    mean, std = tuple(0.1 * i for i in range(16)), tuple(1 + 0.1 * i for i in range(16))
    autoencoder, video = _random(latent=Latent(mean=mean, std=std)), torch.randn(1, 3, 5, 16, 16)
    raw = autoencoder.posterior(video)[0]
    for channel in (0, 7, 15):
        expected = (raw[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(autoencoder.encode(video)[:, channel], expected)
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(video)), autoencoder.rebuild(raw, 5))


@torch.inference_mode()
def test_log_variances_are_clipped(autoencoder: OpenSoraV13Autoencoder) -> None:
    bias = autoencoder.net.encoder.conv_out.conv.bias
    bias[16:24], bias[24:] = -1000.0, 1000.0
    assert autoencoder.posterior(torch.zeros(1, 3, 1, 8, 8))[1].unique().tolist() == [-30, 20]


@torch.inference_mode()
def test_tiles_leave_planes_that_fit_alone_and_are_near_otherwise(autoencoder: OpenSoraV13Autoencoder) -> None:
    autoencoder.initialise()
    coarse = torch.randn(1, 3, 1, 2, 6, generator=torch.Generator().manual_seed(0))
    small, large = (F.interpolate(coarse, size=(5, 16, width), mode="trilinear") for width in (512, 640))
    plain = [autoencoder.encode(video) for video in (small, large)]
    autoencoder.tile(True)
    tiled = [autoencoder.encode(video) for video in (small, large)]
    assert torch.equal(plain[0], tiled[0])
    assert plain[1].shape == tiled[1].shape
    assert not torch.equal(plain[1], tiled[1])
    assert _correlation(plain[1][:, :3], tiled[1][:, :3]) > 0.9
    shown = autoencoder.decode(tiled[1])
    autoencoder.tile(False)
    assert shown.shape == large.shape
    assert _correlation(shown, autoencoder.decode(tiled[1])) > 0.9


@torch.inference_mode()
def test_training_draws_from_the_posterior(autoencoder: OpenSoraV13Autoencoder) -> None:
    video = torch.randn(1, 3, 5, 16, 16)
    first, again, other = (autoencoder(video, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, other.video)
    assert first.mean.shape == first.logvar.shape == first.sample.shape == (1, 16, 2, 2, 2)


def test_only_all_of_it_can_be_trained(autoencoder: OpenSoraV13Autoencoder) -> None:
    autoencoder.requires_grad_(False)
    autoencoder.train_only("all")
    assert all(parameter.requires_grad for parameter in autoencoder.parameters())
    with pytest.raises(ValueError, match="no part 'spatial'"):
        autoencoder.train_only("spatial")


def test_it_learns_to_reconstruct() -> None:
    """Thirty steps on four pictures with detail inside a latent cell: 0.31 of the first loss was measured."""
    autoencoder = _random()
    autoencoder.initialise()
    video = F.interpolate(torch.rand(4, 3, 1, 6, 8) * 2 - 1, size=(1, 24, 32), mode="trilinear")
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=5e-4)
    losses = []
    for _ in range(30):
        loss = (autoencoder(video).video - video).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())
    assert losses[-1] < 0.5 * losses[0]


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
