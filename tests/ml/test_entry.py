"""The call that every task shares: its command line, and the result that says it finished."""

import json
import logging
from pathlib import Path

import pytest

from ml.entry import CallError, lpips_weights, parse
from ml.recipe import Recipe


def arguments(tmp_path: Path, *more: str) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe.load("v2_0", "tiny").dump(), encoding="utf-8")
    fixed = ["clips", "--recipe", str(recipe), "--workspace", str(tmp_path), "--out", str(tmp_path / "out")]
    return [*fixed, *more]


def test_inputs_and_options_are_read_by_name(tmp_path: Path) -> None:
    call = parse(
        arguments(tmp_path, "--input", "a=x", "--input", "b=y", "--input", "b=z", "--option", "stage=s"), ["clips"], ""
    )
    assert call.input("a") == Path("x")
    assert call.inputs["b"] == (Path("y"), Path("z"))
    assert call.option("stage") == "s"
    assert call.recipe.id == "v2_0-tiny"
    with pytest.raises(CallError, match="exactly one --input b=FOLDER, got 2"):
        call.input("b")
    with pytest.raises(CallError, match="needs --option shard=VALUE"):
        call.option("shard")


def test_a_call_without_a_recipe_says_so_when_one_is_needed(tmp_path: Path) -> None:
    call = parse(["probe", "--workspace", str(tmp_path), "--out", str(tmp_path / "o")], ["probe"], "")
    with pytest.raises(CallError, match="needs --recipe FILE"):
        _ = call.recipe


def test_the_data_version_moves_with_the_data_and_not_with_pictures(tmp_path: Path) -> None:
    def version(data: str, picture: str) -> str:
        call = parse(arguments(tmp_path), ["clips"], "")
        (call.out / "clips.parquet").write_text(data, encoding="utf-8")
        (call.out / "sheet.png").write_text(picture, encoding="utf-8")
        call.finish({"clips_cut": 3}, pictures=["sheet.png"])
        result = json.loads((call.out / "result.json").read_text(encoding="utf-8"))
        assert result["metrics"]["clips_cut"] == 3
        assert result["metrics"]["seconds"] >= 0
        return str(result["data_version"])

    assert version("a", "p") == version("a", "q")
    assert version("a", "p") != version("b", "p")


@pytest.mark.parametrize("fp8", [False, True])
def test_torchaos_failures_are_told_where_a_stage_computes_in_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fp8: bool
) -> None:
    for name in ("torchao", "bitsandbytes"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    words = arguments(tmp_path)
    document = Recipe.load("v2_0", "tiny").model_dump(mode="json")
    document["stages"][1]["engine"].update(fp8=fp8, precision="bf16")
    recipe = Recipe.validate_document(document, "changed")
    (tmp_path / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    parse(words, ["clips"], "")
    assert (logging.getLogger("torchao").level == logging.NOTSET) is fp8
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


def test_a_pair_without_equals_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="'oops' is not NAME=VALUE"):
        parse(arguments(tmp_path, "--option", "oops"), ["clips"], "")


def test_lpips_weights_are_the_inputs_or_else_the_caches(tmp_path: Path) -> None:
    given = parse(arguments(tmp_path, "--input", "lpips=weights"), ["clips"], "")
    assert lpips_weights(given) == Path("weights") / "alex.safetensors"
    cached = tmp_path / "cache" / "lpips" / "alex.safetensors"
    assert lpips_weights(parse(arguments(tmp_path), ["clips"], "")) == cached
