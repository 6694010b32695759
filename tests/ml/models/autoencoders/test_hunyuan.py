"""The video autoencoder: released names and size, causality, scaling, tiling, and that it learns."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ml.models.autoencoders.hunyuan import (
    VideoAutoencoder,
    build_autoencoder,
    load_autoencoder,
    load_released,
    save_autoencoder,
)
from ml.models.weights import CheckpointMismatch, Origin
from ml.recipe import Recipe

PAPER = Recipe.load("v2_0", "paper").autoencoder
TINY = Recipe.load("v2_0", "tiny").autoencoder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def autoencoder() -> VideoAutoencoder:
    torch.manual_seed(0)
    return build_autoencoder(TINY).eval()


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
        built = build_autoencoder(PAPER)
    found = {name: tuple(value.shape) for name, value in built.net.state_dict().items()}
    assert found == _published()
    assert built.scale == 0.476986


def test_strides_are_those_of_the_fact_sheet() -> None:
    with torch.device("meta"):
        net = build_autoencoder(PAPER).net
    down = [block.downsamplers[0].conv.conv.stride for block in net.encoder.down_blocks[:3]]
    up = [block.upsamplers[0].upsample_factor for block in net.decoder.up_blocks[:3]]
    assert down == up == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]
    assert net.encoder.down_blocks[3].downsamplers is None


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_and_decode_shapes(autoencoder: VideoAutoencoder, frames: int) -> None:
    video = torch.randn(1, 3, frames, 16, 24)
    with torch.no_grad():
        latent = autoencoder.encode(video)
        assert latent.shape == (1, *autoencoder.latent_shape(frames, 16, 24)) == (1, 16, (frames - 1) // 4 + 1, 2, 3)
        assert autoencoder.decode(latent).shape == video.shape


@pytest.mark.parametrize("shape", [(4, 16, 16), (5, 12, 16), (5, 16, 20)])
def test_shapes_that_do_not_divide_are_refused(autoencoder: VideoAutoencoder, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot encode"):
        autoencoder.encode(torch.zeros(1, 3, *shape))


def test_causal_the_first_latent_knows_the_first_frame_only(autoencoder: VideoAutoencoder) -> None:
    """Group norms are over all frames, so causality holds for convolutions, attention and pads: shown without norms."""
    net = _without_norms(autoencoder)
    video = torch.randn(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    changed = video.clone()
    changed[:, :, 5:] += 1
    with torch.no_grad():
        before, after, picture = (net.posterior(v)[0] for v in (video, changed, video[:, :, :1]))
    assert torch.allclose(before[:, :, :2], after[:, :, :2], atol=1e-10)
    assert not torch.allclose(before[:, :, 2], after[:, :, 2], atol=1e-6)
    assert torch.allclose(before[:, :, :1], picture, atol=1e-10)


def test_scale_multiplies_latents_and_decoding_undoes_it(autoencoder: VideoAutoencoder) -> None:
    video = torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        plain, mean = autoencoder.encode(video), autoencoder.posterior(video)[0]
        shown = autoencoder.decode(plain)
        autoencoder.scale = 0.25
        assert torch.allclose(autoencoder.encode(video), 0.25 * mean)
        assert torch.allclose(autoencoder.decode(autoencoder.encode(video)), shown, atol=1e-5)
    autoencoder.scale = 1.0


def test_training_draws_from_the_posterior_and_starts_almost_without_noise(autoencoder: VideoAutoencoder) -> None:
    video = torch.randn(1, 3, 1, 16, 16)
    with torch.no_grad():
        first, mean, logvar = autoencoder(video, torch.Generator().manual_seed(0))
        again, _, _ = autoencoder(video, torch.Generator().manual_seed(0))
        other, _, _ = autoencoder(video, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert mean.shape == logvar.shape == (1, 16, 1, 2, 2)
    assert (0.5 * logvar).exp().mean() < 0.1


def test_tiling_changes_large_inputs_only(autoencoder: VideoAutoencoder) -> None:
    small, large = torch.randn(1, 3, 1, 32, 32), torch.randn(1, 3, 1, 32, 320)
    with torch.no_grad():
        plain = [autoencoder.encode(video) for video in (small, large)]
        autoencoder.tile(True)
        tiled = [autoencoder.encode(video) for video in (small, large)]
        assert autoencoder.decode(tiled[1]).shape == large.shape
        autoencoder.tile(False)
    assert torch.equal(plain[0], tiled[0])
    assert plain[1].shape == tiled[1].shape
    assert not torch.equal(plain[1], tiled[1])


def test_it_learns_to_reconstruct() -> None:
    """Fifty steps on four smooth pictures: 0.35 to 0.53 of the error of their mean picture was measured over seeds."""
    torch.manual_seed(0)
    built = build_autoencoder(TINY)
    video = torch.nn.functional.interpolate(torch.rand(4, 3, 1, 2, 3) * 2 - 1, size=(1, 32, 48), mode="trilinear")
    optimizer = torch.optim.AdamW(built.parameters(), lr=2e-3)
    for _ in range(50):
        reconstruction, _, _ = built(video)
        loss = (reconstruction - video).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * (video - video.mean(dim=(0, 2), keepdim=True)).abs().mean()


def test_weights_survive_a_round_trip_with_their_scale(autoencoder: VideoAutoencoder, tmp_path: Path) -> None:
    autoencoder.scale = 0.375
    save_autoencoder(tmp_path, autoencoder, Origin("v2_0-tiny", "vae_stage1"))
    loaded, video = load_autoencoder(tmp_path, TINY, "v2_0-tiny").eval(), torch.randn(1, 3, 5, 16, 16)
    assert loaded.scale == 0.375
    with torch.no_grad():
        assert torch.equal(loaded.encode(video), autoencoder.encode(video))
    autoencoder.scale = 1.0
    with pytest.raises(CheckpointMismatch, match="channels"):
        load_autoencoder(tmp_path, TINY.model_copy(update={"channels": (8, 16, 32, 64)}), "v2_0-tiny")
    with pytest.raises(CheckpointMismatch, match="v1_2-tiny"):
        load_autoencoder(tmp_path, TINY, "v1_2-tiny")


def test_released_weights_load_strictly(autoencoder: VideoAutoencoder, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in autoencoder.net.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    loaded = load_released(TINY, tmp_path / "vae.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in loaded.net.state_dict().items())
    state.pop("quant_conv.bias")
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"quant_conv\.bias"):
        load_released(TINY, tmp_path / "vae.safetensors")


def _without_norms(autoencoder: VideoAutoencoder) -> VideoAutoencoder:
    torch.manual_seed(0)
    net = build_autoencoder(TINY).eval().double()
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    return net
