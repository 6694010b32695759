"""Sizes against the published table of Open-Sora 2.0, and the arithmetic of latent frames."""

import pytest

from ml.shapes import Size, Strides, nearest_size, nominal_area, sizes_of

HUNYUAN = Strides(temporal=4, spatial=8, patch=2)


@pytest.mark.parametrize(
    ("resolution", "aspect", "size"),
    [
        ("256px", "16:9", Size(192, 336)),
        ("256px", "1:1", Size(256, 256)),
        ("256px", "4:3", Size(224, 288)),
        ("256px", "2.39:1", Size(160, 384)),
        ("768px", "16:9", Size(576, 1024)),
        ("768px", "1.85:1", Size(560, 1040)),
        ("768px", "2.39:1", Size(496, 1184)),
        ("768px", "1:1", Size(768, 768)),
    ],
)
def test_sizes_are_those_that_open_sora_2_infers_at(resolution: str, aspect: str, size: Size) -> None:
    assert sizes_of(resolution, HUNYUAN.pixels)[aspect] == size


@pytest.mark.parametrize("resolution", ["64px", "96px", "256px", "768px", "1024px"])
def test_every_size_is_whole_tokens_and_no_larger_than_named(resolution: str) -> None:
    sizes = sizes_of(resolution, 16)
    assert len(set(sizes.values())) == len(sizes)
    for size in sizes.values():
        assert size.height % 16 == size.width % 16 == 0
        assert size.area <= nominal_area(resolution)


def test_tokens_of_the_published_long_clip() -> None:
    assert HUNYUAN.latent_frames(129) == 33
    assert HUNYUAN.tokens(Size(576, 1024), 129) == 33 * 2304 == 76032
    assert HUNYUAN.tokens(Size(256, 256), 1) == 256


def test_a_causal_autoencoder_encodes_4k_plus_1_frames() -> None:
    assert [n for n in range(1, 18) if HUNYUAN.encodes(n)] == [1, 5, 9, 13, 17]
    assert not HUNYUAN.encodes(0)


def test_an_explicit_size_is_itself_and_nothing_else() -> None:
    assert sizes_of("48x80", 16) == {"80:48": Size(48, 80)}
    assert nominal_area("48x80") == 3840


def test_nearest_size_compares_ratios_not_pixels() -> None:
    assert nearest_size("256px", 16, Size(1080, 1920)) == Size(192, 336)
    assert nearest_size("256px", 16, Size(1920, 1080)) == Size(336, 192)
    assert nearest_size("256px", 16, Size(100, 100)) == Size(256, 256)


def test_what_is_no_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        nominal_area("720p")
    with pytest.raises(ValueError, match="smaller than one token"):
        sizes_of("8px", 16)
