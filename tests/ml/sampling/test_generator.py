"""From requests to clips with real, small, untrained networks of every generation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from ml.diffusion.mask_strategy import MaskStrategyError
from ml.models.autoencoders.registry import build_autoencoder
from ml.models.inputs import Text
from ml.recipe import Recipe
from ml.sampling.generator import Generator, Networks, sample_size
from ml.sampling.references import encode_reference
from ml.sampling.requests import Request, RequestError
from ml.shapes import Size
from ml.training.networks import new_transformer

GENERATIONS = ("v1_0", "v1_1", "v1_2", "v1_3", "v2_0")
MakeRecipe = Callable[..., Recipe]


class Words:
    """A text encoder that draws an embedding for every prompt, and remembers what it was asked."""

    digest = "0" * 16

    def __init__(self, recipe: Recipe) -> None:
        self.section, self.asked = recipe.text, list[str]()

    def encode(self, prompts: Sequence[str]) -> Text:
        self.asked += prompts
        section, contexts, pooled = self.section, [], []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt.encode()))
            contexts.append(torch.randn(section.max_tokens, section.context_dim, generator=generator))
            pooled.append(torch.randn(section.pooled_dim, generator=generator))
        real = torch.tensor([max(1, min(section.max_tokens, len(prompt.split()))) for prompt in prompts])
        mask = torch.arange(section.max_tokens)[None] < real[:, None]
        return Text(torch.stack(contexts), torch.stack(pooled), mask)


class Kept(Generator):
    """A generator that remembers the latents which it decodes."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        transformer = new_transformer(recipe).eval()
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        autoencoder = build_autoencoder(recipe.autoencoder.net, recipe.autoencoder.latent).eval()
        autoencoder.initialise()
        super().__init__(recipe, Networks(transformer, autoencoder, Words(recipe)))
        self.latents: list[Tensor] = []
        decode = autoencoder.decode

        def remember(latent: Tensor, frames: int | None = None) -> Tensor:
            self.latents.append(latent.clone())
            return decode(latent, frames)

        autoencoder.decode = remember  # type: ignore[method-assign]

    @property
    def asked(self) -> list[str]:
        """Prompts that were embedded."""
        text = self.networks.text
        assert isinstance(text, Words)
        return text.asked


@pytest.fixture
def generation(make_generation: MakeRecipe, make_recipe: MakeRecipe) -> MakeRecipe:
    """Factory `generation("v1_2", sampling={...})` of small recipes of every generation."""

    def make(name: str, **over: Any) -> Recipe:
        return make_recipe(**over) if name == "v2_0" else make_generation(name, **over)

    return make


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture, dark left and bright right."""
    ramp = np.broadcast_to(np.linspace(0, 255, 160).astype(np.uint8)[None, :, None], (96, 160, 3))
    cv2.imwrite(str(tmp_path / "ramp.png"), np.ascontiguousarray(ramp))
    return tmp_path / "ramp.png"


@pytest.fixture
def film(tmp_path: Path, make_video: Callable[..., Path]) -> Path:
    """A video of 51 frames."""
    return make_video(tmp_path / "film.mp4", 51, (96, 160))


def reference(generator: Generator, path: Path) -> Tensor:
    return encode_reference(path, generator.size, generator.recipe.strides, generator.networks.autoencoder)


# --- every generation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_seed_is_a_clip_whatever_stands_beside_it(generation: MakeRecipe, name: str) -> None:
    made = Kept(generation(name))
    wave, sea = Request("a red wave"), Request("a quiet sea")
    both, alone = made.videos(wave, [0, 1]), made.videos(wave, [1])
    assert [clip.shape for clip in both] == [(made.sampling.frames, 48, 80, 3)] * 2
    assert np.abs(both[1].astype(int) - alone[0].astype(int)).max() <= 1
    torch.testing.assert_close(made.latents[0][1:], made.latents[1], rtol=1e-3, atol=1e-4)
    assert not np.array_equal(both[0], both[1])
    assert not torch.equal(made.latents[1], (made.videos(sea, [1]), made.latents[-1])[1])


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_picture_is_a_clip_of_one_frame(generation: MakeRecipe, name: str) -> None:
    model = {"input_size": (1, 6, 10)} if name == "v1_0" else {}
    made = Kept(generation(name, sampling={"frames": 1}, model=model))
    (clip,) = made.videos(Request("a red wave"), [0])
    assert clip.shape == (1, 48, 80, 3)
    assert made.latents[0].shape[2] == 1


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_negative_prompt_takes_the_place_of_no_text(generation: MakeRecipe, name: str) -> None:
    """1.x has a null caption of its own and embeds nothing without one; 2.0 embeds the empty prompt."""
    results = {}
    for negative in ("", "blurry"):
        made = Kept(generation(name, sampling={"negative_prompt": negative}))
        made.videos(Request("a red wave"), [0])
        results[negative] = made.latents[0]
        own = name != "v2_0" and not negative
        assert made.asked[1:] == ([] if own else [negative])
    assert not torch.allclose(results[""], results["blurry"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "score", "prompt"),
    [
        ("v1_2", {"style": "v1_2", "aesthetic": 6.5}, "a cat aesthetic score: 6.5."),
        ("v1_3", {"style": "v1_3", "aesthetic": 6.5, "motion": None}, "a cat The aesthetic score is excellent."),
        ("v2_0", {"style": "v2_0", "motion": 4}, "a cat. 12 FPS. 4 motion score."),
    ],
)
def test_scores_are_words_of_the_prompt(generation: MakeRecipe, name: str, score: Any, prompt: str) -> None:
    made = Kept(generation(name, sampling={"score": score}))
    made.videos(Request("a cat"), [0])
    assert made.asked[0] == prompt


@pytest.mark.parametrize("changed", [{"guidance_text": 1.0}, {"steps": 4}, {"fps": 6}])
def test_guidance_steps_and_rate_change_the_clip(generation: MakeRecipe, changed: dict[str, Any]) -> None:
    one, other = Kept(generation("v1_2")), Kept(generation("v1_2", sampling=changed))
    for made in (one, other):
        made.videos(Request("a red wave"), [0])
    assert not torch.equal(one.latents[0], other.latents[0])


def test_evaluations_are_rows_of_the_network(generation: MakeRecipe) -> None:
    """Three steps of two rows; three rows where something is given (2.0); one row where text guidance is 1."""
    assert Kept(generation("v1_2")).plan.evaluations == 6
    given = {"condition": "i2v_head", "frames": 9, "guidance_image": 2.0, "ramp": False}
    assert Kept(generation("v2_0", sampling=given)).plan.evaluations == 9
    assert Kept(generation("v1_2", sampling={"guidance_text": 1.0})).plan.evaluations == 3


# --- given by kind ------------------------------------------------------------------------------------------------


def test_i2v_of_2_0_gives_the_picture_back_untouched(generation: MakeRecipe, picture: Path) -> None:
    made = Kept(generation("v2_0", sampling={"condition": "i2v_head"}))
    made.videos(Request("a red wave", (picture,)), [0, 1])
    wanted = reference(made, picture)
    assert torch.equal(made.latents[0][0, :, :1], wanted)
    assert torch.equal(made.latents[0][1, :, :1], wanted)
    assert not torch.equal(made.latents[0][0, :, 1], made.latents[0][1, :, 1])


def test_a_request_chooses_its_own_kind(generation: MakeRecipe, picture: Path) -> None:
    """The recipe makes clips of text; one request starts and ends with a picture."""
    made = Kept(generation("v2_0", sampling={"frames": 9}))
    made.videos(Request("a red wave", (picture, picture), "i2v_loop"), [0])
    wanted = reference(made, picture)
    assert torch.equal(made.latents[0][0, :, :1], wanted)
    assert torch.equal(made.latents[0][0, :, -1:], wanted)
    made.videos(Request("a red wave"), [0])
    assert not torch.allclose(made.latents[1][0, :, :1], wanted, atol=1e-2)


def test_1_3_is_told_of_its_picture(generation: MakeRecipe, picture: Path) -> None:
    made = Kept(generation("v1_3", sampling={"guidance_image": 3.0}))
    plain, given = Request("a red wave"), Request("a red wave", (picture,), "i2v_head")
    for request in (plain, given):
        made.videos(request, [0])
    assert not torch.allclose(made.latents[0], made.latents[1], atol=1e-3)


def test_a_mask_of_1_3_keeps_the_first_latent(generation: MakeRecipe, picture: Path) -> None:
    """Without a condition 1.3 takes mask strategies as 1.2 does."""
    made = Kept(generation("v1_3", sampling={"condition": "mask"}))
    made.videos(Request("a red wave", (picture,), mask_strategy="0"), [0])
    torch.testing.assert_close(made.latents[0][0, :, :1], reference(made, picture))


# --- given by strategy --------------------------------------------------------------------------------------------


def test_strategy_0_keeps_the_first_latent(generation: MakeRecipe, picture: Path) -> None:
    """1.2 keeps it exactly; 1.1 passes it through the last step of least noise (variance about 1e-4)."""
    for name, tolerance in (("v1_2", 1e-6), ("v1_1", 0.2)):
        made = Kept(generation(name))
        made.videos(Request("a red wave", (picture,), mask_strategy="0"), [0, 1])
        wanted = reference(made, picture)[:, 0]
        for latent in made.latents[0]:
            assert float((latent[:, 0] - wanted).abs().max()) < tolerance
            assert float((latent[:, 1] - wanted).abs().max()) > 0.3


def test_strategies_connect_two_pictures_and_edit(generation: MakeRecipe, picture: Path) -> None:
    made = Kept(generation("v1_2", sampling={"align": None, "frames": 17, "steps": 8}))
    made.videos(Request("a red wave", (picture, picture), mask_strategy="0;0,1,0,-1,1"), [0])
    wanted = reference(made, picture)[:, 0]
    for place in (0, -1):
        torch.testing.assert_close(made.latents[0][0, :, place], wanted)
    made.videos(Request("a red wave", (picture,), mask_strategy="0,0,0,0,1,0.4"), [0])
    edited = made.latents[1][0, :, 0]
    assert float((edited - wanted).abs().mean()) > 1e-3


def test_starts_are_aligned_to_what_is_decoded_together(generation: MakeRecipe, picture: Path) -> None:
    """1.2 rounds places to 5 latents: a start at 8 of 10 becomes 5."""
    made = Kept(generation("v1_2", sampling={"align": 5, "frames": 34}))
    made.videos(Request("a red wave", (picture,), mask_strategy="0,0,0,8,1"), [0])
    kept = [bool(torch.allclose(made.latents[0][0, :, i], reference(made, picture)[:, 0])) for i in range(10)]
    assert kept == [False] * 5 + [True] + [False] * 4


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "request_", "error", "problem"),
    [
        ("v1_0", {"references": 1}, RequestError, "makes whole clips only: it takes no references"),
        ("v1_0", {"condition": "i2v_head"}, RequestError, "knows no condition 'i2v_head'"),
        ("v1_2", {"references": 1}, RequestError, "needs a mask strategy to place references"),
        ("v1_2", {"references": 1, "condition": "i2v_head"}, RequestError, "knows no condition 'i2v_head'"),
        ("v1_2", {"references": 1, "mask_strategy": "0,1"}, MaskStrategyError, "asks for reference 1, 1 were given"),
        ("v1_2", {"mask_strategy": "0"}, MaskStrategyError, "asks for reference 0, 0 were given"),
        ("v1_2", {"references": 1, "mask_strategy": "0,0,0,0,9"}, MaskStrategyError, "places 9 latents in a clip of 2"),
        ("v1_2", {"references": 1, "mask_strategy": "first"}, MaskStrategyError, "must read loop,reference"),
        ("v1_2", {"references": 1, "mask_strategy": "0,0,0,0,1,2"}, MaskStrategyError, r"edit_ratio lies in 0\.\.1"),
        ("v1_3", {"references": 1, "mask_strategy": "0"}, RequestError, "takes no mask strategy and no loops"),
        ("v1_3", {"references": 1}, RequestError, "the kind is t2v"),
        ("v2_0", {"references": 1, "mask_strategy": "0"}, RequestError, "takes no mask strategy and no loops"),
        ("v2_0", {"references": 1}, RequestError, "the kind is t2v"),
        ("v2_0", {"condition": "i2v_head"}, ValueError, "takes 1 references, got 0"),
        ("v2_0", {"references": 2, "condition": "i2v_head"}, ValueError, "takes 1 references, got 2"),
        (
            "v2_0",
            {"references": 1, "condition": "i2v_loop"},
            RequestError,
            "i2v_loop gives 2 latent frames, the clip has 2",
        ),
        ("v1_2", {"references": 2, "mask_strategy": "0"}, MaskStrategyError, "no group .* places reference 1 of 2"),
        ("v1_2", {"references": 1, "mask_strategy": "0;1"}, MaskStrategyError, "a reference in loop 1 of 1"),
        ("v2_0", {"references": 1, "condition": "inpaint"}, ValueError, "gives no fixed number of latents"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    generation: MakeRecipe, picture: Path, name: str, request_: dict[str, Any], error: type[Exception], problem: str
) -> None:
    asked = {**request_, "references": (picture,) * request_.get("references", 0)}
    with pytest.raises(error, match=problem):
        Kept(generation(name)).videos(Request("a red wave", **asked), [0])


def test_a_video_shorter_than_its_kind_is_refused(generation: MakeRecipe, picture: Path) -> None:
    made = Kept(generation("v2_0", sampling={"frames": 41}))
    with pytest.raises(ValueError, match="v2v_head needs 9 latents at the head, the reference has 1"):
        made.videos(Request("a red wave", (picture,), "v2v_head"), [0])


def test_a_kind_that_the_clip_has_no_room_for_is_refused_not_replaced(generation: MakeRecipe, film: Path) -> None:
    for name in ("v1_3", "v2_0"):
        made = Kept(generation(name, sampling={"frames": 17, "condition": "v2v_head"}))
        with pytest.raises(RequestError, match=r"v2v_head gives 9 latent frames, the clip has 5: .* or i2v_head"):
            made.videos(Request("a red wave", (film,)), [0])
        assert not made.latents


@pytest.mark.parametrize(
    ("name", "asked", "problem"),
    [
        ("v2_0", {"condition": "i2v_head"}, "reference 0 has 3 latent frames or more, the clip 2"),
        ("v1_2", {"mask_strategy": "0"}, "reference 0 has 5 latent frames or more, the clip 2"),
        ("v1_1", {"mask_strategy": "0,0"}, "reference 0 has 5 latent frames or more, the clip 4"),
    ],
)
def test_a_video_longer_than_the_clip_is_refused(
    generation: MakeRecipe, film: Path, name: str, asked: dict[str, Any], problem: str
) -> None:
    with pytest.raises((RequestError, MaskStrategyError), match=problem):
        Kept(generation(name)).videos(Request("a red wave", (film,), **asked), [0])


@pytest.mark.parametrize(("strategy", "first"), [("0,0,6,0,1", 6), ("0,0,-1,0,1", -1), ("0,0,0,0,1", 0)])
def test_a_strategy_may_select_of_a_film(generation: MakeRecipe, film: Path, strategy: str, first: int) -> None:
    """A part near the start is the same whether the rest of the film is read or not."""
    made = Kept(generation("v1_2", sampling={"align": None}))
    made.videos(Request("a red wave", (film,), mask_strategy=strategy), [0])
    torch.testing.assert_close(made.latents[0][0, :, 0], reference(made, film)[:, first])


# --- guidance-distilled networks ----------------------------------------------------------------------------------


def test_a_distilled_network_is_told_its_guidance_and_asked_once_a_step(make_recipe: MakeRecipe) -> None:
    """As Flux: the scale is an input, and no row without the prompt is evaluated."""
    results = {}
    for scale in (4.0, 1.5):
        plain = make_recipe(sampling={"guidance_text": scale})
        recipe = plain.model_copy(update={"model": plain.model.model_copy(update={"guidance_embed": True})})
        made = Kept(recipe)
        made.videos(Request("a red wave"), [0])
        assert made.plan.evaluations == recipe.sampling.steps
        results[scale] = made.latents[0]
    assert not torch.equal(results[4.0], results[1.5])


# --- loops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "loops", "shared_latents", "shared"),
    [("v1_1", 4, 3, 2, 2), ("v1_2", 34, 2, 5, 17), ("v1_2", 8, 3, 0, 0)],
)
def test_loops_share_frames_with_the_one_before(
    generation: MakeRecipe, name: str, frames: int, loops: int, shared_latents: int, shared: int
) -> None:
    """n k - (k - 1) c frames: 5 latents are 17 frames in 1.2; without shared latents clips follow each other."""
    sampling = {"frames": frames, "loops": loops, "loop_latents": shared_latents, "align": None}
    made = Kept(generation(name, sampling=sampling))
    (clip,) = made.videos(Request("a red wave"), [0])
    assert len(clip) == made.frames == frames * loops - (loops - 1) * shared


def test_a_loop_starts_with_the_last_latents_of_the_film_so_far(generation: MakeRecipe) -> None:
    """Encoded again from its pixels; the prompt may change on the way."""
    sampling = {"frames": 34, "loops": 2, "loop_latents": 5, "align": 5}
    made = Kept(generation("v1_2", sampling=sampling))
    prompts = Request("|0|a red wave|1|a quiet sea")
    first, second = (made.videos(prompts, [0, 1]), made.latents[-1])[0], made.latents[-1]
    assert len(made.latents) == 2
    autoencoder = made.networks.autoencoder
    film = type(autoencoder).decode(autoencoder, made.latents[0], 34)
    with torch.inference_mode():
        wanted = autoencoder.encode(film)[:, :, 5:]
    torch.testing.assert_close(second[:, :, :5], wanted, rtol=1e-4, atol=1e-4)
    assert [len(clip) for clip in first] == [51, 51]
    assert [prompt.split(" aesthetic")[0] for prompt in made.asked] == ["a red wave", "a quiet sea"]


def test_what_a_loop_is_given_is_what_the_film_ends_with(generation: MakeRecipe) -> None:
    """20 frames are 5 + 1 latents, which no multiple of 5 ends: the last 17 frames are given all the same."""
    made = Kept(generation("v1_2", sampling={"frames": 20, "loops": 2, "loop_latents": 5, "align": 5}))
    (clip,) = made.videos(Request("a red wave"), [0])
    autoencoder = made.networks.autoencoder
    film = type(autoencoder).decode(autoencoder, made.latents[0], 20)
    with torch.inference_mode():
        wanted = autoencoder.encode(film[:, :, 3:])
    torch.testing.assert_close(made.latents[1][:, :, :5], wanted, rtol=1e-4, atol=1e-4)
    assert len(clip) == 23


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resolution", "aspect", "wanted"),
    [
        ("v2_0", "96px", "16:9", Size(64, 128)),
        ("v1_2", "720p", "16:9", Size(720, 1280)),
        ("v1_2", "480p", "16:9", Size(480, 848)),
        ("v1_2", "480p", "27:50", Size(920, 440)),
        ("v1_0", "48x80", "16:9", Size(48, 80)),
    ],
)
def test_the_sample_size_is_the_resolutions_nearest(name: str, resolution: str, aspect: str, wanted: Size) -> None:
    tiny = Recipe.load(name, "tiny")
    sampling = tiny.sampling.model_copy(update={"resolution": resolution, "aspect": aspect})
    assert sample_size(tiny.model_copy(update={"sampling": sampling})) == wanted
    unknown = sampling.model_copy(update={"aspect": "7:1"})
    with pytest.raises(RequestError, match="'7:1' is unknown"):
        sample_size(tiny.model_copy(update={"sampling": unknown}))
