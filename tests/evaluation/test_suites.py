"""Suites: they cover every table, they are data, and they follow the recipe."""

import json

import pytest

from evaluation.suites import UnknownTableError, suite, wanted_buckets
from ml.manifest import CAPTIONS, CLIPS, CURATED, EXAMPLES, LATENTS, SCORES, SHOTS, VIDEOS
from ml.recipe import Recipe

TABLES = (VIDEOS, SHOTS, CLIPS, SCORES, CURATED, CAPTIONS, EXAMPLES, LATENTS)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("v2_0")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_expects_its_key_and_columns_and_can_be_stored(table, recipe):
    made = suite(table.name, recipe)
    present = {e.column for e in made.expects if e.kind == "ExpectColumnValuesToNotBeNull"}
    assert {column.name for column in table.columns} <= present
    assert next(e.column for e in made.expects if e.kind == "ExpectColumnValuesToBeUnique") == table.key
    assert json.loads(json.dumps(made.as_json()))["table"] == table.name


def test_bounds_come_from_the_recipe(recipe):
    def longest(r: Recipe) -> float:
        found = [e for e in suite("clips", r).expects if e.column == "duration_seconds" and "max_value" in e.arguments]
        return found[0].arguments["max_value"]

    paper = Recipe.load("v2_0", "paper")
    assert longest(paper) - longest(recipe) == pytest.approx(15.0 - 4.0)
    scored = {e.column for e in suite("scores", recipe).expects}
    assert {"motion", "motion_revision", "text_area", "brightness_revision"} <= scored


def test_wanted_buckets_are_those_of_all_stages(recipe):
    assert wanted_buckets(recipe) == ["64px/1", "64px/17", "64px/33", "96px/1", "96px/17"]


def test_a_shared_corpus_has_no_recipe_and_any_licence_will_do():
    kinds = {e.kind for e in suite("videos", None).expects if e.column == "licence"}
    assert "ExpectColumnValuesToBeInSet" not in kinds
    assert "ExpectColumnValueLengthsToBeBetween" in kinds


def test_unknown_tables_and_missing_recipes_are_refused(recipe):
    with pytest.raises(UnknownTableError, match="known: videos"):
        suite("weather", recipe)
    with pytest.raises(UnknownTableError, match="clips needs a recipe"):
        suite("clips", None)
