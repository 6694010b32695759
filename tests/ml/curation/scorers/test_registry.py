import pytest

from ml.curation.scorers import registry
from ml.curation.scorers.scorer import ScorerError
from ml.recipe import Recipe


def test_the_packaged_recipe_asks_only_for_scorers_that_exist():
    assert set(Recipe.load("v2_0").curation.scores) <= set(registry.REGISTRY)


def test_scorers_come_in_the_order_asked_for():
    assert [scorer.name for scorer in registry.build(("sharpness", "motion"))] == ["sharpness", "motion"]


def test_an_unknown_scorer_names_the_known_ones():
    with pytest.raises(ScorerError, match="no scorer aesthetics; known: brightness, motion"):
        registry.build(("motion", "aesthetics"))
