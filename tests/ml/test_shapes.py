"""Sizes against the published tables, and the arithmetic of latent frames of every generation."""

import pytest

from ml.shapes import Size, Strides, frame_interval, nearest_size, nominal_area, size_of, sizes_of

FRAME = Strides("frame", spatial=8, patch=2, pads=True)
MICRO = Strides("micro", spatial=8, patch=2, pads=True)
WINDOW = Strides("window", spatial=8, patch=2, pads=True)
HUNYUAN = Strides("causal", spatial=8, patch=2)
DC_AE = Strides("group", spatial=32, patch=1)


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


@pytest.mark.parametrize("resolution", ["144p", "240p", "256", "360p", "480p", "512", "720p", "1024", "1080p", "2k"])
def test_listed_sizes_lose_less_than_one_multiple_of_what_was_published(resolution: str) -> None:
    from ml.aspects import table

    listed, sizes = table(resolution), sizes_of(resolution, 8)
    assert len(set(sizes.values())) == len(sizes)
    for name, size in sizes.items():
        height, width = listed[name]
        assert size == Size(height - height % 8, width - width % 8)


def test_tokens_of_the_published_long_clip() -> None:
    assert HUNYUAN.latent_frames(129) == 33
    assert HUNYUAN.tokens(Size(576, 1024), 129) == 33 * 2304 == 76032
    assert HUNYUAN.tokens(Size(256, 256), 1) == 256


@pytest.mark.parametrize(
    ("strides", "frames", "latents"),
    [
        (FRAME, 16, 16),
        (FRAME, 360, 360),
        # 1.2: 2 s and 4 s are 51 and 102 frames; 16 s are 408.
        (MICRO, 51, 15),
        (MICRO, 102, 30),
        (MICRO, 408, 120),
        (MICRO, 1, 1),
        (MICRO, 8, 2),
        (MICRO, 34, 10),
        # 1.3: 49, 65, 81, 97 and 113 frames.
        (WINDOW, 49, 15),
        (WINDOW, 65, 20),
        (WINDOW, 97, 30),
        (WINDOW, 113, 35),
        (WINDOW, 17, 5),
        (WINDOW, 5, 2),
        (WINDOW, 1, 1),
        (HUNYUAN, 129, 33),
        (HUNYUAN, 65, 17),
        (HUNYUAN, 1, 1),
        (DC_AE, 128, 32),
        (DC_AE, 4, 1),
        (DC_AE, 1, 1),
    ],
)
def test_latent_frames_are_those_of_the_released_autoencoders(strides: Strides, frames: int, latents: int) -> None:
    assert strides.encodes(frames)
    assert strides.latent_frames(frames) == latents


@pytest.mark.parametrize(
    ("strides", "encoded"),
    [
        (FRAME, list(range(1, 36))),
        (MICRO, list(range(1, 36))),
        (WINDOW, [1, 5, 9, 13, 17, 33]),
        (HUNYUAN, [1, 5, 9, 13, 17, 21, 25, 29, 33]),
        (DC_AE, [1, 4, 8, 12, 16, 20, 24, 28, 32]),
    ],
)
def test_what_each_autoencoder_encodes_exactly(strides: Strides, encoded: list[int]) -> None:
    assert [n for n in range(36) if strides.encodes(n)] == encoded


@pytest.mark.parametrize(
    ("strides", "frames", "wanted"),
    [
        (HUNYUAN, 34, (33, 37)),
        (HUNYUAN, 2, (1, 5)),
        (WINDOW, 18, (17, 33)),
        (WINDOW, 100, (97, 113)),
        (DC_AE, 2, (1, 4)),
    ],
)
def test_the_nearest_lengths_stand_on_both_sides(strides: Strides, frames: int, wanted: tuple[int, int]) -> None:
    assert strides.nearest(frames) == wanted


def test_tokens_that_do_not_divide_are_filled_up() -> None:
    """480p at 16:9 is 480x848 when rounded to latent cells: 60 x 106 of them; 1.1 pads, 2.0 must divide."""
    assert FRAME.pixels == 8
    assert FRAME.grid(Size(480, 848), 16) == (16, 60, 106)
    assert FRAME.tokens(Size(480, 848), 16) == 16 * 30 * 53
    assert FRAME.tokens(Size(136, 264), 1) == 9 * 17
    assert (HUNYUAN.pixels, DC_AE.pixels) == (16, 32)
    assert DC_AE.tokens(Size(576, 1024), 128) == 32 * 18 * 32


def test_an_explicit_size_is_itself_and_nothing_else() -> None:
    assert sizes_of("48x80", 16) == {"80:48": Size(48, 80)}
    assert nominal_area("48x80") == 3840


def test_nearest_size_compares_ratios_not_pixels() -> None:
    assert nearest_size("256px", 16, Size(1080, 1920)) == Size(192, 336)
    assert nearest_size("256px", 16, Size(1920, 1080)) == Size(336, 192)
    assert nearest_size("256px", 16, Size(100, 100)) == Size(256, 256)
    assert nearest_size("720p", 8, Size(1080, 1920)) == Size(720, 1280)
    assert nearest_size("1024", 8, Size(500, 2000)) == Size(512, 2048)


def test_what_is_no_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"neither.*nor one of 144p, 256"):
        nominal_area("721p")
    with pytest.raises(ValueError, match="smaller than one token"):
        sizes_of("8px", 16)


@pytest.mark.parametrize(
    ("fps", "limit", "interval"), [(24, 24, 1), (24.02, 24, 1), (30, 24, 2), (60, 24, 3), (12, 24, 1), (48, 24, 2)]
)
def test_frame_rates_are_divided_down_to_the_limit(fps: float, limit: float, interval: int) -> None:
    assert frame_interval(fps, limit) == interval


@pytest.mark.parametrize("resolution", ["144p", "240p", "360p", "480p", "720p", "1080p", "2k", "4k"])
def test_every_published_name_has_its_published_size(resolution: str) -> None:
    """Sizes that coincide after rounding are one bucket, and keep all their names."""
    from ml.aspects import P_NAMES, table

    for multiple in (8, 16, 32):
        for name in P_NAMES:
            height, width = table(resolution)[name]
            found = size_of(resolution, multiple, name)
            assert found == Size(height - height % multiple, width - width % multiple)
            assert found in sizes_of(resolution, multiple).values()


@pytest.mark.parametrize(
    ("resolution", "aspect", "wanted"),
    [
        ("144p", "50:27", Size(136, 256)),
        ("144p", "17:9", Size(136, 256)),
        ("1024", "21:9", Size(640, 1536)),
        ("1024", "16:9", Size(768, 1344)),
        ("512", "2.39:1", Size(320, 768)),
        ("1024", "2048:512", Size(512, 2048)),
        ("256px", "21:9", Size(160, 384)),
        ("48x80", "9:16", Size(48, 80)),
    ],
)
def test_a_name_of_another_table_is_the_nearest_size(resolution: str, aspect: str, wanted: Size) -> None:
    assert size_of(resolution, 8 if resolution in ("144p", "1024", "512") else 16, aspect) == wanted


def test_an_unknown_aspect_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"aspect '7:1' is unknown; known: 8:3, 21:9, .*2\.39:1"):
        size_of("720p", 8, "7:1")
