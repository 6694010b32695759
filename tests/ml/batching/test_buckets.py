import pytest

from ml.batching.buckets import Bucketing, Buckets, Cell, Footage, uniform
from ml.sections import Bucket
from ml.shapes import Size

RULE = Bucketing(multiple=16, fps_max=24, seed=1)


def buckets(table: dict[str, dict[int, float]]) -> Buckets:
    return {r: {t: Bucket(keep=keep, batch=1) for t, keep in row.items()} for r, row in table.items()}


def clip(height: int = 256, width: int = 256, frames: int = 40, fps: float = 24, name: str = "a") -> Footage:
    return Footage(name, Size(height, width), frames, fps)


ALL = buckets({"64px": {1: 1, 9: 1, 17: 1}, "96px": {1: 1, 9: 1, 17: 1, 33: 1}})


@pytest.mark.parametrize(
    ("footage", "wanted"),
    [
        # The longest of the largest resolution; as an image, the largest too.
        (clip(), {("96px", 33), ("96px", 1)}),
        (clip(frames=32), {("96px", 17), ("96px", 1)}),
        (clip(frames=12), {("96px", 9), ("96px", 1)}),
        # Too short for a video: an image still.
        (clip(frames=8), {("96px", 1)}),
        # 86x86 is just over 0.8 of 96 squared, 85x85 just under.
        (clip(86, 86, 17), {("96px", 17), ("96px", 1)}),
        (clip(85, 85, 17), {("64px", 17), ("64px", 1)}),
        (clip(50, 50, 17), set()),
        # 60 frames per second are taken every third: 40 frames are 14.
        (clip(fps=60), {("96px", 9), ("96px", 1)}),
    ],
)
def test_a_clip_takes_the_longest_shape_of_the_largest_resolution(footage: Footage, wanted: set) -> None:
    assert {(cell.resolution, cell.frames) for cell in RULE.cells(footage, ALL)} == wanted


def test_the_size_is_the_nearest_aspect_and_divisible() -> None:
    video, image = RULE.cells(clip(240, 426), ALL)
    assert video == Cell("96px", 33, Size(64, 128))
    assert image == Cell("96px", 1, Size(64, 128))
    assert str(video) == "96px/64x128/33"


def test_a_clip_that_is_not_kept_falls_to_the_next_lower_resolution() -> None:
    table = buckets({"96px": {17: 0.0}, "64px": {17: 1.0}})
    assert [cell.resolution for cell in RULE.cells(clip(), table)] == ["64px"]
    assert RULE.cells(clip(), buckets({"96px": {17: 0.0}})) == ()


def test_keep_is_a_share_of_clips_and_a_draw_of_their_own() -> None:
    half = buckets({"96px": {17: 0.5}})
    names = [f"clip{i}" for i in range(2000)]
    kept = {name for name in names if RULE.cells(clip(name=name), half)}
    # Binomial: 0.5 +- 0.011 (one sigma) at 2000 draws.
    assert 0.45 < len(kept) / len(names) < 0.55
    assert kept == {name for name in reversed(names) if RULE.cells(clip(name=name), half)}
    other = Bucketing(16, 24, seed=2)
    assert kept != {name for name in names if other.cells(clip(name=name), half)}


def test_a_length_is_passed_over_for_a_shorter_one_of_the_same_resolution() -> None:
    """1.2 and 1.3: 33 frames are taken by 0.4 of the clips long enough; 17 by 0.5 of the rest; 9 by what is left."""
    table = {"96px": {t: Bucket(keep=1.0, keep_length=k, batch=1) for t, k in ((33, 0.4), (17, 0.5), (9, 1.0))}}
    drawn = [RULE.cells(clip(name=f"clip{i}"), table)[0].frames for i in range(4000)]
    shares = {frames: drawn.count(frames) / len(drawn) for frames in (33, 17, 9)}
    # Binomials of 4000: +- 0.008 (one sigma).
    assert shares == pytest.approx({33: 0.4, 17: 0.3, 9: 0.3}, abs=0.03)


def test_a_length_and_its_resolution_are_drawn_apart() -> None:
    """Kept by 0.5 x 0.5 at 33 frames; what its resolution drops goes to the lower one, not to a shorter length."""
    top = {33: Bucket(keep=0.5, keep_length=0.5, batch=1), 17: Bucket(keep=1.0, batch=1)}
    table = {"96px": top, "64px": {17: Bucket(keep=1.0, batch=1)}}
    drawn = [RULE.cells(clip(name=f"clip{i}"), table)[0] for i in range(4000)]
    found = [(cell.resolution, cell.frames) for cell in drawn]
    shares = {cell: found.count(cell) / len(found) for cell in set(found)}
    assert shares == pytest.approx({("96px", 33): 0.25, ("64px", 17): 0.25, ("96px", 17): 0.5}, abs=0.03)


def test_a_length_with_keep_0_refuses_the_clip_at_that_resolution() -> None:
    """Stages of 1.1 and 1.2 name the first length that they do not train with keep 0: longer clips go lower down."""
    table = buckets({"96px": {9: 1.0, 17: 0.0}, "64px": {9: 1.0, 17: 1.0, 33: 1.0}})
    names = [f"clip{i}" for i in range(200)]
    long = {RULE.cells(clip(frames=17, name=name), table) for name in names}
    assert {(cell.resolution, cell.frames) for (cell,) in long} == {("64px", 17)}
    short = {RULE.cells(clip(frames=16, name=name), table) for name in names}
    assert {(cell.resolution, cell.frames) for (cell,) in short} == {("96px", 9)}
    # Passing a length over is another thing: the shorter one of the same resolution takes the clip.
    passed = {"96px": {9: Bucket(keep=1.0, batch=1), 17: Bucket(keep=1.0, keep_length=0.0, batch=1)}}
    assert {RULE.cells(clip(frames=17, name=name), passed)[0].frames for name in names} == {9}


def test_rates_are_what_the_taken_frames_leave() -> None:
    assert [RULE.rate(clip(fps=fps)) for fps in (12, 24, 30, 60)] == [12, 24, 15, 20]
    assert RULE.length(clip(frames=40, fps=60)) == 14


def test_listed_resolutions_are_tried_from_the_largest_area_down() -> None:
    """1024 (1.05 M pixels) stands above 720p (0.92 M); the size is the table's, rounded to whole cells."""
    table = buckets({"480p": {1: 1.0}, "1024": {1: 0.0}, "720p": {1: 1.0}})
    (cell,) = Bucketing(8, 24, 1).cells(clip(1080, 1920), table)
    assert cell == Cell("720p", 1, Size(720, 1280))
    assert str(cell) == "720p/720x1280/1"


def test_uniform_draws_are_uniform_and_depend_on_every_part() -> None:
    draws = [uniform(3, "clip", index) for index in range(4000)]
    assert all(0 <= draw < 1 for draw in draws)
    # The mean of 4000 uniform draws is 0.5 +- 0.0046.
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert len({uniform(1, "ab"), uniform(1, "a", "b"), uniform(2, "ab")}) == 3


def test_what_a_clip_holds_is_frames_and_pixels() -> None:
    assert RULE.holds(clip(86, 86, 17), "96px", 17)
    assert not RULE.holds(clip(86, 86, 16), "96px", 17)
    assert not RULE.holds(clip(85, 85, 17), "96px", 17)
