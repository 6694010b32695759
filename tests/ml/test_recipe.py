"""The recipe schema: what it refuses, and how it says so."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml.architectures import Latent, MMDiT, STDiT3
from ml.recipe import Recipe, RecipeError, available, find, header


@pytest.fixture
def document() -> dict[str, Any]:
    return Recipe.load("v2_0", "tiny").model_dump(mode="json")


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.validate_document(document, "mine.yaml")
    return str(caught.value)


GENERATIONS = {"v1_0": "1.0", "v1_1": "1.1", "v1_2": "1.2", "v1_3": "1.3", "v2_0": "2.0", "v2_0_hc": "2.0"}


def small(name: str) -> dict[str, Any]:
    """The document of a packaged recipe in its smallest profile."""
    return Recipe.load(name, "tiny").model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "profile"),
    [*itertools.product(GENERATIONS, ("paper", "tiny")), ("v1_2", "vae"), ("v1_3", "vae"), ("v2_0_hc", "vae")],
)
def test_every_packaged_recipe_loads_and_round_trips(name: str, profile: str) -> None:
    recipe = Recipe.load(name, profile)
    assert Recipe.parse(recipe.dump()) == recipe
    assert recipe.generation.startswith(GENERATIONS[name])
    assert recipe.id == f"{name}-{profile}"
    assert recipe.network.kind == recipe.model.kind


def test_the_packaged_recipes_are_the_five_generations() -> None:
    assert set(available()) == set(GENERATIONS)


def test_paper_holds_the_published_values() -> None:
    recipe = Recipe.load("v2_0", "paper")
    assert isinstance(recipe.model, MMDiT)
    assert (recipe.model.hidden_size, recipe.model.num_heads) == (3072, 24)
    assert (recipe.model.depth, recipe.model.depth_single_blocks) == (19, 38)
    assert [stage.published.gpu_days for stage in recipe.stages if stage.published] == [2240, 384, 1536]
    assert [stage.compute.devices for stage in recipe.stages] == [224, 192, 192]
    assert recipe.stage("stage1").buckets["256px"][129].batch == 3
    assert recipe.autoencoder.latent == Latent(scale=0.476986)


@pytest.mark.parametrize(
    ("name", "autoencoder", "law", "frames", "latents", "text"),
    [
        ("v1_0", "sd", "frame", 16, 16, ("t5", 120)),
        ("v1_1", "sd", "frame", 64, 64, ("t5", 200)),
        ("v1_2", "opensora_v1_2", "micro", 102, 30, ("t5", 300)),
        ("v1_3", "opensora_v1_3", "window", 113, 35, ("t5", 300)),
        ("v2_0", "hunyuan", "causal", 129, 33, ("t5_clip", 512)),
        ("v2_0_hc", "dc_ae", "group", 128, 32, ("t5_clip", 512)),
    ],
)
def test_every_generation_samples_as_published(
    name: str, autoencoder: str, law: str, frames: int, latents: int, text: tuple[str, int]
) -> None:
    recipe = Recipe.load(name, "paper")
    assert (recipe.autoencoder.kind, recipe.autoencoder.law) == (autoencoder, law)
    assert (recipe.text.kind, recipe.text.max_tokens) == text
    assert recipe.sampling.frames == frames
    assert recipe.strides.latent_frames(frames) == latents


def test_the_network_takes_its_sizes_from_the_other_sections(document: dict[str, Any]) -> None:
    """2.0 counts a whole token of 2 x 2 cells; 1.x counts latent channels and knows how long a caption may be."""
    network = Recipe.load("v2_0", "paper").network
    assert isinstance(network, MMDiT)
    assert (network.in_channels, network.vec_in_dim, network.context_in_dim) == (64, 768, 4096)
    assert Recipe.load("v2_0_hc", "paper").network.in_channels == 128
    windowed = Recipe.load("v1_3", "paper").network
    assert isinstance(windowed, STDiT3)
    assert (windowed.in_channels, windowed.caption_channels, windowed.model_max_length) == (16, 4096, 300)
    assert windowed.out_channels == 32
    document["text"]["max_tokens"] = 9
    assert Recipe.validate_document(document, "r").network == Recipe.load("v2_0", "tiny").network


@pytest.mark.parametrize(
    ("path", "misspelt", "nearest"),
    [
        (("curation", "keep"), "treshold", "thresholds"),
        (("stages", 0, "optimizer"), "betaz", "betas"),
        (("autoencoder", "stages", 0, "loss"), "perceptal", "perceptual"),
        ((), "budget_us", "budget_usd"),
        (("model",), "axes_dims", "axes_dim"),
        (("autoencoder", "net"), "block_out_chanels", "block_out_channels"),
        (("objective",), "logit_men", "logit_mean"),
        (("objective", "shift"), "min_token", "min_tokens"),
        (("sampling", "score"), "asthetic", "aesthetic"),
        (("stages", 0, "buckets", "64px", "1"), "keeep", "keep"),
        (("stages", 0, "engine"), "precison", "precision"),
    ],
)
def test_a_misspelt_key_names_its_nearest_neighbour(
    document: dict[str, Any], path: tuple[str | int, ...], misspelt: str, nearest: str
) -> None:
    node: Any = document
    for part in path:
        node = node[part]
    node[misspelt] = 1
    message = refusal(document)
    assert ".".join(map(str, (*path, misspelt))) in message
    assert f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("name", "path", "misspelt", "nearest"),
    [
        ("v1_0", ("model",), "time_scal", "time_scale"),
        ("v1_0", ("objective",), "beta_strat", "beta_start"),
        ("v1_1", ("model",), "qk_nrm", "qk_norm"),
        ("v1_2", ("autoencoder", "net"), "micro_frame_sizes", "micro_frame_size"),
        ("v1_2", ("objective", "shift"), "base_are", "base_area"),
        ("v1_3", ("model",), "kernelsize", "kernel_size"),
        ("v1_3", ("objective", "drop_given"), "nothin", "nothing"),
        ("v2_0_hc", ("autoencoder", "net"), "width", "widths"),
    ],
)
def test_neighbours_are_those_of_the_kind_at_hand(
    name: str, path: tuple[str, ...], misspelt: str, nearest: str
) -> None:
    """A section with several kinds names keys of its own kind, without pydantic's name of the kind in the path."""
    document = small(name)
    node: Any = document
    for part in path:
        node = node[part]
    node[misspelt] = 1
    message = refusal(document)
    assert f"{'.'.join((*path, misspelt))}: unknown key (did you mean '{nearest}'?)" in message


def test_a_key_of_another_kind_is_unknown() -> None:
    document = small("v1_1")
    document["model"]["axes_dim"] = [4, 10, 10]
    assert "model.axes_dim: unknown key" in refusal(document)
    document = small("v1_0")
    document["model"]["kind"] = "stdit9"
    message = refusal(document)
    assert "model: " in message
    assert "'stdit9'" in message
    assert "'mmdit'" in message


def test_a_missing_key_is_named(document: dict[str, Any]) -> None:
    del document["stages"][1]["optimizer"]["lr"]
    assert "stages.1.optimizer.lr: required, and missing" in refusal(document)


def test_a_shape_that_the_strides_do_not_divide_is_refused_with_one_that_works(document: dict[str, Any]) -> None:
    document["stages"][0]["buckets"]["50x80"] = {"9": {"keep": 1.0, "batch": 2}}
    message = refusal(document)
    assert "shape 50x80 is not divisible by 16 (autoencoder stride 8 x patch 2); use 48x80" in message


@pytest.mark.parametrize(("frames", "hint"), [(34, "use 33 or 37"), (2, "use 1 or 5")])
def test_a_frame_count_that_cannot_be_encoded_is_refused(document: dict[str, Any], frames: int, hint: str) -> None:
    document["stages"][0]["buckets"]["64px"] = {frames: {"keep": 1.0, "batch": 2}}
    assert hint in refusal(document)


def test_sections_must_agree(document: dict[str, Any]) -> None:
    changed = copy.deepcopy(document)
    changed["stages"][0]["tier"] = "bas"
    changed["curation"]["keep"]["thresholds"]["mottion"] = {"min": 1}
    changed["stages"][1]["name"] = "stage1"
    message = refusal(changed)
    assert "no dataset tier 'bas' (did you mean 'base'?)" in message
    assert "threshold on 'mottion'" in message
    assert "did you mean 'motion'?" in message
    assert "stage name 'stage1' is used twice" in message


@pytest.mark.parametrize(
    ("name", "sizes", "problem"),
    [
        ("v2_0", {"axes_dim": [4, 4, 4]}, "axes_dim (4, 4, 4) must be even and add up to the head size 24"),
        ("v2_0", {"axes_dim": [5, 9, 10]}, "axes_dim (5, 9, 10) must be even"),
        ("v1_2", {"num_heads": 5}, "hidden_size 96 is not divisible by 5 heads"),
        ("v1_3", {"kernel_size": None}, "give kernel_size too"),
        ("v1_2", {"only_train_temporal": True, "skip_temporal": True}, "leaves nothing to train"),
    ],
)
def test_sizes_of_a_network_must_fit_each_other(name: str, sizes: dict[str, Any], problem: str) -> None:
    document = small(name)
    document["model"] |= sizes
    message = refusal(document)
    assert problem in message
    assert "model" in message


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("v1_0", "i2v_head", "stdit knows no 'i2v_head'"),
        ("v1_1", "i2v_head", "stdit2 knows no 'i2v_head'"),
        ("v1_2", "image_heads", "stdit3 knows no 'image_heads' (did you mean 'image_head'?)"),
        ("v1_3", "image_head", "stdit3 knows no 'image_head'"),
        ("v1_3", "v2v_head_easy", "stdit3 knows no 'v2v_head_easy'"),
        ("v2_0", "v2v_head_noisy", "mmdit knows no 'v2v_head_noisy'"),
    ],
)
def test_given_frames_are_those_of_the_networks_own_generation(name: str, kind: str, hint: str) -> None:
    document = small(name)
    document["stages"][0]["conditions"] = {"t2v": 1, kind: 1}
    assert f"stages.{document['stages'][0]['name']}.conditions: {hint}" in refusal(document)


def test_a_condition_that_cannot_be_sampled_is_refused() -> None:
    document = small("v1_2")
    document["sampling"]["condition"] = "i2v_head"
    assert "sampling.condition: stdit3 knows no 'i2v_head'" in refusal(document)
    document["sampling"]["condition"] = "mask"
    assert Recipe.validate_document(document, "r").sampling.condition == "mask"


@pytest.mark.parametrize(
    ("name", "solver", "right"),
    [("v1_0", "euler", "ddpm or dpm_solver"), ("v1_2", "ddpm", "euler"), ("v2_0", "dpm_solver", "euler")],
)
def test_a_solver_of_another_objective_is_refused(name: str, solver: str, right: str) -> None:
    document = small(name)
    document["sampling"] |= {"solver": solver, "flaw_fix": False, "ramp": False, "sdedit": False}
    document["sampling"] |= {"guided_channels": None}
    kind = document["objective"]["kind"]
    assert f"sampling.solver: solver {solver!r} does not solve {kind}: use {right}" in refusal(document)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_latents_statistics_have_one_value_a_channel(name: str) -> None:
    document = small("v1_3")
    document["autoencoder"]["latent"] = {name: [1.0, 2.0, 3.0]}
    assert f"autoencoder.latent.{name}: 3 values for 16 latent channels" in refusal(document)
    document["autoencoder"]["latent"] = {name: [1.0] * 16}
    Recipe.validate_document(document, "r")


def test_only_a_two_stage_autoencoder_is_trained_in_parts() -> None:
    assert {stage.part for stage in Recipe.load("v1_2", "tiny").autoencoder.stages} == {"spatial", "temporal", "all"}
    document = small("v2_0")
    document["autoencoder"]["stages"][0]["part"] = "temporal"
    assert "autoencoder.stages.vae_stage1: hunyuan has no temporal part to train" in refusal(document)


def test_a_gate_on_a_dimension_that_is_not_run_is_refused(document: dict[str, Any]) -> None:
    document["evaluation"]["gate"].append({"metric": "vbench/scene", "at_least": 0.2})
    assert "unknown metric 'vbench/scene'" in refusal(document)


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("loss/heldout", "did you mean 'loss/held_out'?"),
        ("loss/stage/stage9", "unknown metric 'loss/stage/stage9'"),
        ("reconstruction/psnr_mean", "did you mean 'reconstruction/psnr_mean_frame'?"),
        ("preference/beauty", "unknown metric 'preference/beauty'"),
        ("vbench/total", "unknown metric 'vbench/total'"),
        ("speed", "unknown metric 'speed'"),
    ],
)
def test_a_gate_on_what_no_report_has_is_refused(document: dict[str, Any], metric: str, hint: str) -> None:
    """On either side of a rule: a gate that can never pass is found before anything is paid for."""
    gate = document["evaluation"]["gate"]
    document["evaluation"]["gate"] = [*gate, {"metric": metric, "at_least": 0.2}]
    assert hint in refusal(document)
    document["evaluation"]["gate"] = [*gate, {"metric": "loss/held_out", "at_most": 0.9, "relative_to": metric}]
    assert hint in refusal(document)
    for known in ("loss/stage/stage1", "reconstruction/lpips", "preference/wins", "vbench/temporal_flickering"):
        document["evaluation"]["gate"] = [{"metric": known, "at_most": 1.0}]
        Recipe.validate_document(document, "r")


@pytest.mark.parametrize(
    ("name", "over", "problem"),
    [
        (
            "v2_0",
            {"loss": {"reconstruction": 1.0, "latent": 1.0}},
            "autoencoder.stages.vae_stage1.loss.latent: hunyuan has no such term",
        ),
        (
            "v1_0",
            {"loss": {"reconstruction": 1.0, "identity": 1.0}},
            "autoencoder.stages.vae_stage1.loss.identity: sd has no such term",
        ),
        (
            "v2_0_hc",
            {"loss": {"reconstruction": 1.0, "kl": 1e-6}},
            "autoencoder.stages.vae_stage1.loss.kl: dc_ae has no such term",
        ),
        ("v2_0", {"frames": 1, "random_frames": True}, "random_frames: only [1] of its 1 frames can be encoded"),
    ],
)
def test_an_autoencoder_stage_has_losses_and_lengths_of_its_network(
    name: str, over: dict[str, Any], problem: str
) -> None:
    document = small(name)
    document["autoencoder"]["stages"][0] |= over
    assert problem in refusal(document)


def test_weights_that_are_only_loaded_need_their_latent(document: dict[str, Any]) -> None:
    document["autoencoder"] |= {"stages": [], "weights_uri": "weights/mine.safetensors", "latent": None}
    assert "autoencoder.latent: weights_uri without stages needs it" in refusal(document)
    document["autoencoder"]["latent"] = {"scale": 0.5}
    assert Recipe.validate_document(document, "r").autoencoder.latent == Latent(scale=0.5)
    document["autoencoder"]["weights_uri"] = None
    assert "autoencoder: give stages to train it, or weights_uri to load it" in refusal(document)


@pytest.mark.parametrize(
    ("name", "resolution", "frames", "problem"),
    [
        ("v1_3", "64px", 18, "18 frames cannot be encoded by opensora_v1_3; use 17 or 33"),
        ("v2_0_hc", "128px", 17, "17 frames cannot be encoded by dc_ae; use 16 or 20"),
        ("v2_0_hc", "48x96", 16, "shape 48x96 is not divisible by 32 (autoencoder stride 32 x patch 1); use 32x96"),
        ("v1_2", "50x80", 17, "shape 50x80 is not divisible by 8"),
    ],
)
def test_shapes_are_refused_by_the_autoencoder_at_hand(name: str, resolution: str, frames: int, problem: str) -> None:
    document = small(name)
    document["stages"][0]["buckets"] = {resolution: {frames: {"keep": 1.0, "batch": 2}}}
    assert problem in refusal(document)


def test_two_names_of_one_size_are_two_buckets(document: dict[str, Any]) -> None:
    """Latents are named by resolution and size (`clip/64px/48x80/17`), so that neither takes the other's place."""
    assert "17" in document["stages"][0]["buckets"]["64px"]
    document["stages"][1]["buckets"] = {"48x80": {"17": {"keep": 1.0, "batch": 2}}}
    Recipe.validate_document(document, "r")


def test_unknown_names_point_to_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'v2_0'"):
        find("v2.0")
    with pytest.raises(RecipeError, match="did you mean 'tiny'"):
        Recipe.load("v2_0", "tinny")
    with pytest.raises(RecipeError, match="did you mean 'stage1'"):
        Recipe.load("v2_0", "tiny").stage("stge1")


def test_a_users_folder_shadows_the_packaged_recipe(tmp_path: Path) -> None:
    text = find("v2_0").read_text(encoding="utf-8").replace("title: Open-Sora 2.0", "title: Mine")
    (tmp_path / "v2_0.yaml").write_text(text, encoding="utf-8")
    assert Recipe.load("v2_0", "tiny", (tmp_path,)).title == "Mine"
    assert Recipe.load("v2_0", "tiny").title == "Open-Sora 2.0"


def test_broken_documents_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1,", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.yaml is not YAML"):
        Recipe.load("broken", "paper", (tmp_path,))
    with pytest.raises(RecipeError, match="holds no mapping"):
        Recipe.load("list", "paper", (tmp_path,))


def test_the_digest_moves_with_its_own_sections_only(document: dict[str, Any]) -> None:
    before = Recipe.validate_document(document, "r")
    document["curation"]["keep"]["thresholds"]["motion"]["min"] = 0.75
    after = Recipe.validate_document(document, "r")
    assert before.digest("curation.keep") != after.digest("curation.keep")
    for section in ("curation.shots", "curation.scores", "stages.stage1", "model"):
        assert before.digest(section) == after.digest(section)


PROMISES = ("What it trains", "How long", "How many dollars", "Score to expect", "Exact command")


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_header_says_what_a_reader_needs(name: str) -> None:
    path = available()[name]
    lines = header(path).splitlines()
    for promise in PROMISES:
        (line,) = [line for line in lines if line.startswith(promise)]
        assert len(line.removeprefix(promise).strip()) > 10, f"{path.name}: {promise} says nothing"
    assert f"opensora plan {name}" in header(path)
    assert f"opensora demo --recipe {name}" in header(path)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == path.stem
