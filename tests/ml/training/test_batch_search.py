"""The largest batch that fits: the search itself, and real steps on a CPU, measured by what their backward keeps."""

from collections.abc import Callable
from math import inf

import pytest
import torch

from ml import memory
from ml.batching.buckets import Cell
from ml.recipe import Recipe
from ml.shapes import Size
from ml.training.batch_search import (
    RealStep,
    batch_sizes,
    batch_sizes_apart,
    blank_batch,
    largest,
    largest_cell,
    search,
)

STILL, VIDEO = Cell("48x80", 1, Size(48, 80)), Cell("48x80", 5, Size(48, 80))


@pytest.mark.parametrize("start", [1, 2, 3, 16, 100, 5000])
def test_the_search_is_exact_wherever_it_starts(start: int) -> None:
    for limit in (*range(70), 999, 4095, 4096, 9999):
        tried: list[int] = []

        def fits(count: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(count)
            return count <= limit

        assert largest(fits, start) == min(limit, 4096)
        assert len(tried) == len(set(tried)), "nothing is tried twice"
        assert len(tried) <= 26, "doubling, then halving: twice the bits of 4096 at most"


def test_a_bound_is_kept() -> None:
    assert largest(lambda count: True, start=1, most=10) == 10
    assert largest(lambda count: count < 10, start=50, most=10) == 9


def test_a_search_asks_every_bucket_at_its_recipes_batch_first(mini: Recipe) -> None:
    asked: list[tuple[Cell, int]] = []

    def taken(cell: Cell, count: int) -> float:
        asked.append((cell, count))
        return count * cell.frames if count < 40 else inf

    assert search(mini, mini.stage("stage1"), taken, 60) == {"48x80": {1: 39, 5: 12}}
    assert asked[0] == (STILL, 3)
    assert next(pair for pair in asked if pair[0] == VIDEO) == (VIDEO, 2)


@pytest.mark.parametrize("checkpoints", [(0, 0), (1, 1)])
def test_what_a_real_step_keeps_grows_by_the_example_and_the_search_ends_where_it_must(
    make_recipe: Callable[..., Recipe], checkpoints: tuple[int, int]
) -> None:
    engine = {**make_recipe().stage("stage1").engine.model_dump(), "checkpoint_blocks": checkpoints}
    recipe = make_recipe(stage={"engine": engine})
    stage = recipe.stage("stage1")
    step = RealStep.of(recipe, stage)
    step(STILL, 1)  # the first step makes the optimizer's state
    two, three, six = (step(VIDEO, count) for count in (2, 3, 6))
    assert three > two > 0
    assert six - three == pytest.approx(3 * (three - two), rel=0.02)
    room = (three + step(VIDEO, 4)) / 2
    assert search(recipe, stage, step, room)["48x80"][5] == 3


def test_recomputing_keeps_less(make_recipe: Callable[..., Recipe]) -> None:
    found = []
    for checkpoints in ((0, 0), (1, 1)):
        engine = {**make_recipe().stage("stage1").engine.model_dump(), "checkpoint_blocks": checkpoints}
        recipe = make_recipe(stage={"engine": engine})
        found.append(RealStep.of(recipe, recipe.stage("stage1"))(VIDEO, 4))
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("name", ["v1_1", "v1_2", "v1_3"])
def test_every_generation_can_be_tried(make_generation: Callable[..., Recipe], name: str) -> None:
    recipe = make_generation(name)
    step = RealStep.of(recipe, recipe.stages[0])
    cell = largest_cell(recipe, "48x80", recipe.sampling.frames)
    assert step(cell, 2) > 0
    assert (blank_batch(recipe, cell, 2).heads is not None) == (name == "v1_3")


def test_without_the_gpu_that_is_asked_for_the_answer_is_predicted() -> None:
    recipe = Recipe.load("v2_0", "paper")
    stage = recipe.stage("stage1")
    found = batch_sizes(recipe, stage)
    assert found.how == "predicted"
    room = memory.available(stage.compute)
    for resolution, frames in (("256px", 1), ("256px", 129), ("768px", 1)):
        batch = found.sizes[resolution][frames]
        assert batch == memory.largest_batch(recipe, stage, (resolution, frames), room)
    assert batch_sizes(recipe, stage, 1.0).sizes["256px"][129] == 0


def test_another_process_finds_the_same() -> None:
    recipe = Recipe.load("v2_0", "paper")
    stage = recipe.stage("stage1")
    assert batch_sizes_apart(recipe, stage, 60.0 * memory.GIB) == batch_sizes(recipe, stage, 60.0 * memory.GIB)


@pytest.mark.gpu
def test_on_a_gpu_the_largest_batch_fits_and_one_more_does_not(make_recipe: Callable[..., Recipe]) -> None:
    gpu = {"accelerators": "H100:1", "nodes": 1, "price": "h200-hist-2025q1"}
    recipe = make_recipe(stage={"compute": gpu})
    stage, room = recipe.stage("stage1"), 2.0 * memory.GIB
    before = torch.cuda.mem_get_info()[0]
    found = batch_sizes_apart(recipe, stage, room + memory.CUDA_GIB * memory.GIB)
    assert found.how == "measured"
    assert torch.cuda.mem_get_info()[0] == pytest.approx(before, abs=0.1 * memory.GIB)
    step, batch = RealStep.of(recipe, stage), found.sizes["48x80"][5]
    assert step(STILL, 1) < room
    assert 0 < batch < 4096
    assert step(VIDEO, batch) <= room < step(VIDEO, batch + 1)
