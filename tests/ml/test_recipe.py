"""The recipe schema: what it refuses, and how it says so."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ml.recipe import Recipe, RecipeError, available, find, header


@pytest.fixture
def document() -> dict[str, Any]:
    return Recipe.load("v2_0", "tiny").model_dump(mode="json")


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.validate_document(document, "mine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("profile", ["paper", "tiny"])
def test_every_packaged_recipe_loads_and_round_trips(profile: str) -> None:
    for name in available():
        recipe = Recipe.load(name, profile)
        assert Recipe.parse(recipe.dump()) == recipe


def test_paper_holds_the_published_values() -> None:
    recipe = Recipe.load("v2_0", "paper")
    assert (recipe.model.width, recipe.model.heads) == (3072, 24)
    assert (recipe.model.double_blocks, recipe.model.single_blocks) == (19, 38)
    assert [stage.published.gpu_days for stage in recipe.stages if stage.published] == [2240, 384, 1536]
    assert [stage.compute.devices for stage in recipe.stages] == [224, 192, 192]
    assert recipe.stage("stage1").buckets["256px"][129].batch == 3
    assert recipe.autoencoder.scale == 0.476986


@pytest.mark.parametrize(
    ("path", "misspelt", "nearest"),
    [
        (("curation", "keep"), "treshold", "thresholds"),
        (("stages", 0, "optimizer"), "betaz", "betas"),
        (("autoencoder", "stages", 0, "loss"), "perceptal", "perceptual"),
        ((), "budget_us", "budget_usd"),
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
    changed["model"]["rope_axes"] = [4, 4, 4]
    message = refusal(changed)
    assert "no dataset tier 'bas' (did you mean 'base'?)" in message
    assert "threshold on 'mottion'" in message
    assert "did you mean 'motion'?" in message
    assert "stage name 'stage1' is used twice" in message
    assert "rope_axes sum to 12, head size is 24" in message


def test_a_gate_on_a_dimension_that_is_not_run_is_refused(document: dict[str, Any]) -> None:
    document["evaluation"]["gate"].append({"metric": "vbench/scene", "at_least": 0.2})
    assert "unknown metric 'vbench/scene'" in refusal(document)


def test_weights_that_are_only_loaded_need_their_scale(document: dict[str, Any]) -> None:
    document["autoencoder"] |= {"stages": [], "weights_uri": "weights/mine.safetensors", "scale": None}
    assert "autoencoder.scale: weights_uri without stages needs it" in refusal(document)
    document["autoencoder"]["scale"] = 0.5
    assert Recipe.validate_document(document, "r").autoencoder.scale == 0.5


def test_two_names_of_one_bucket_are_refused_even_across_stages(document: dict[str, Any]) -> None:
    assert "17" in document["stages"][0]["buckets"]["64px"]
    document["stages"][1]["buckets"] = {"48x80": {"17": {"keep": 1.0, "batch": 2}}}
    assert "buckets: '64px' and '48x80' are both 48x80 at 17 frames; use one name" in refusal(document)
    document["stages"][1]["buckets"] = {"48x80": {"21": {"keep": 1.0, "batch": 2}}}
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


def test_every_header_says_what_a_reader_needs() -> None:
    for path in available().values():
        text = header(path)
        for promise in ("What it trains", "How long", "How many dollars", "Score to expect", "Exact command"):
            assert promise in text, f"{path.name} does not say: {promise}"
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == path.stem
