"""The table in the repository is the one that the estimate makes today, and says what the recipes say."""

from pathlib import Path

from benchmarks.memory_table import batch_rows, document, stage_rows
from ml.memory import usable, worst
from ml.recipe import Recipe

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.md"


def test_the_table_is_todays() -> None:
    again = "run `python -m benchmarks.memory_table --out benchmarks/memory.md` and look at what changed"
    assert TABLE.read_text(encoding="utf-8") == document(), again


def test_rows_are_those_of_the_recipe() -> None:
    recipe = Recipe.load("v2_0", "paper")
    first, *_ = stage_rows(recipe)
    assert first[:5] == ("v2_0", "stage1", "11.89 B", "224 H200", "zero2")
    assert first[5] == "8 of 19 and 38 of 38"
    assert float(first[-3]) * 2**30 < usable(141)
    assert worst(recipe, recipe.stages[0])[1].batch == int(first[8])


def test_every_published_batch_stands_in_a_row() -> None:
    recipe = Recipe.load("v2_0", "paper")
    rows = list(batch_rows(recipe, recipe.stages[0]))
    assert [row[4] for row in rows] == ["45", "12", "6", "4", "3", "13", "7"]
    assert [row[2] for row in rows][:2] == ["1", "5 to 33"]
    assert all(int(row[4]) <= int(row[6]) for row in rows)
