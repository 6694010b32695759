"""References read and encoded by real autoencoders, and placed by kind or by strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from ml.batching.datasets import to_video
from ml.batching.video import DecodeError, read_clip
from ml.diffusion.mask_strategy import MaskStrategyError, Placement, parse
from ml.models.autoencoders.registry import build_autoencoder
from ml.recipe import Recipe
from ml.sampling.references import encode_reference, encode_video, frames_of, given_by_kind, given_by_strategy
from ml.sampling.requests import RequestError
from ml.shapes import Size, Strides

SIZE, GRID = Size(48, 80), (4, 3, 6, 10)


@pytest.fixture(scope="module")
def autoencoder(mini: Recipe) -> Any:
    """The small 4x8x8 autoencoder, untrained."""
    torch.manual_seed(0)
    return build_autoencoder(mini.autoencoder.net).eval()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that is brighter on the right."""
    ramp = np.broadcast_to(np.linspace(0, 255, 160).astype(np.uint8)[None, :, None], (96, 160, 3))
    cv2.imwrite(str(tmp_path / "ramp.png"), np.ascontiguousarray(ramp))
    return tmp_path / "ramp.png"


def latents(frames: int, value: float) -> torch.Tensor:
    """[C,f,h,w] whose frames are value, value + 1, ..."""
    return torch.arange(frames).float()[None, :, None, None].expand(4, -1, 6, 10) + value


def test_a_picture_is_one_latent(mini: Recipe, autoencoder: Any, picture: Path) -> None:
    found = encode_reference(picture, SIZE, mini.strides, autoencoder)
    assert found.shape == (4, 1, 6, 10)
    with torch.no_grad():
        wanted = autoencoder.encode(to_video([read_clip(picture, None, SIZE)]))[0]
    assert torch.equal(found, wanted)
    assert not found.requires_grad


@pytest.mark.parametrize(("frames", "latent_frames"), [(5, 2), (8, 2), (11, 3)])
def test_of_a_video_the_longest_part_that_can_be_encoded_is_taken(
    mini: Recipe, autoencoder: Any, tmp_path: Path, make_video: Callable[..., Path], frames: int, latent_frames: int
) -> None:
    """8 frames are encoded as their first 5, 11 as their first 9 (4 k + 1)."""
    path = make_video(tmp_path / "clip.mp4", frames, (96, 160))
    found = encode_reference(path, SIZE, mini.strides, autoencoder)
    assert found.shape == (4, latent_frames, 6, 10)
    whole = read_clip(path, None, SIZE)[: 4 * (latent_frames - 1) + 1]
    assert torch.equal(found, encode_video(to_video([whole]), autoencoder)[0])


def test_a_file_that_is_no_picture_is_named(mini: Recipe, autoencoder: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DecodeError, match=r"text\.png cannot be decoded"):
        encode_reference(tmp_path / "text.png", SIZE, mini.strides, autoencoder)


def test_kinds_put_references_at_the_ends() -> None:
    grid = GRID[1:]
    head = given_by_kind([latents(1, 5)], "i2v_head", grid, causal=True)
    assert (head.kind, head.indices) == ("i2v_head", (0,))
    assert head.latent[0, 0, :, 0, 0].tolist() == [5, 0, 0]
    both = given_by_kind([latents(2, 5), latents(2, 8)], "i2v_loop", grid, causal=True)
    assert both.indices == (0, 2)
    # A head keeps its first latent, a tail its last.
    assert both.latent[0, 0, :, 0, 0].tolist() == [5, 0, 9]
    assert torch.equal(both.condition[0, 0, :, 0, 0], torch.tensor([1.0, 0, 1]))


@pytest.mark.parametrize(
    ("law", "latents", "frames"),
    [("frame", 4, 4), ("causal", 6, 21), ("group", 5, 20), ("window", 6, 33), ("micro", 1, 17), ("micro", 6, 34)],
)
def test_latents_need_so_many_frames(law: Any, latents: int, frames: int) -> None:
    """1.2 encodes 17 frames together: a part of them would be padded and encoded otherwise."""
    assert frames_of(Strides(law, 8, 2), latents) == frames


def test_a_film_is_decoded_no_further_than_it_is_used(
    mini: Recipe, autoencoder: Any, tmp_path: Path, make_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "film.mp4", 60, (96, 160))
    read: list[int] = []

    def watched(*arguments: Any) -> Any:
        frames = read_clip(*arguments)
        read.append(len(frames))
        return frames

    monkeypatch.setattr("ml.sampling.references.read_clip", watched)
    assert encode_reference(path, SIZE, mini.strides, autoencoder, 4).shape == (4, 4, 6, 10)
    assert read == [13]
    assert encode_reference(path, SIZE, mini.strides, autoencoder, 99).shape[1] == 15


def test_a_kind_too_long_for_the_clip_is_refused() -> None:
    """33 frames are 9 latents: a clip of 3 has no room for them; a clip of 12 takes them."""
    with pytest.raises(RequestError, match=r"v2v_head gives 9 latent frames, the clip has 3: .* or i2v_head"):
        given_by_kind([latents(9, 0)], "v2v_head", GRID[1:], causal=True)
    long = given_by_kind([latents(9, 0)], "v2v_head", (12, 6, 10), causal=True)
    assert (long.kind, long.indices) == ("v2v_head", tuple(range(9)))
    grouped = given_by_kind([latents(8, 0)], "v2v_head", (12, 6, 10), causal=False)
    assert grouped.indices == tuple(range(8))


@pytest.mark.parametrize(
    ("references", "kind", "grid", "problem"),
    [
        ([], "i2v_head", GRID[1:], "takes 1 references, got 0"),
        ([latents(1, 0)], "i2v_loop", GRID[1:], "takes 2 references, got 1"),
        ([latents(1, 0)] * 2, "i2v_tail", GRID[1:], "takes 1 references, got 2"),
        ([latents(4, 0)], "v2v_head", (12, 6, 10), "needs 9 latents at the head, the reference has 4"),
        ([latents(4, 0)], "v2v_tail", (12, 6, 10), "needs 9 latents at the tail, the reference has 4"),
        ([latents(4, 0)], "i2v_head", GRID[1:], "reference 0 has 4 latent frames or more, the clip 3"),
        ([latents(1, 0)], "interpolate", GRID[1:], "gives no fixed number"),
    ],
)
def test_the_wrong_references_are_refused(references: Any, kind: str, grid: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        given_by_kind(references, kind, grid, causal=True)


def test_a_strategy_places_each_clips_own_references() -> None:
    own = [[latents(2, 5)], [latents(2, 7)]]
    given = given_by_strategy(GRID, own, parse("0,0,1,0,1,0;0,0,0,-1,1,0.4"), 0, None)
    assert given is not None
    assert given.kind == "mask"
    assert given.latent[:, 0, :, 0, 0].tolist() == [[6, 0, 5], [8, 0, 7]]
    assert given.mask.tolist() == [pytest.approx([0, 1, 0.4])] * 2


def test_a_loop_that_is_given_nothing_is_made_whole() -> None:
    placements = (Placement(loop=1, reference=0),)
    assert given_by_strategy(GRID, [[latents(1, 5)]], placements, 0, None) is None
    assert given_by_strategy(GRID, [[latents(1, 5)]], placements, 1, None) is not None
    assert given_by_strategy(GRID, [[]], (), 0, None) is None


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ("0,1", "asks for reference 1, 1 were given"),
        ("0,0,0,0,4", "places 4 latents in a clip of 3"),
        ("0,0,0,3", "target_start 3 lies outside of 3"),
        ("0,0,2", "reference_start 2 lies outside of 2"),
    ],
)
def test_a_strategy_that_cannot_be_followed_is_refused(strategy: str, problem: str) -> None:
    with pytest.raises(MaskStrategyError, match=problem):
        given_by_strategy(GRID, [[latents(2, 5)]], parse(strategy), 0, None)
